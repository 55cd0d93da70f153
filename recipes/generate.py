# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Writes answers with an adapter that causal_lm.py has saved, without its prompt and with it.

python recipes/generate.py outputs/causal_lm "seller: Mara, thing: lamp, day: Monday"

With `--export`, the model is also written as an ordinary folder that holds the prompt, and a server that knows nothing
of this package (`transformers serve`) is asked for the first answer:

python recipes/generate.py outputs/restaurants "name: The Red Fox, food: Thai, area: harbour" --export outputs/served
"""

import argparse
import json
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from urllib.request import Request, urlopen

from causal_lm import generate_texts, make_ids
from peft import PeftConfig, PeftModel
from shared.language_model import HUB_NAME, find_language_model
from shared.models import load_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from peft_ptuning_ext import export_standalone


# PEFT 0.21 itself reads the old name while it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

STARTING = 120  # seconds that a server may take to start


def find_base_model(adapter: str) -> str:
    """Returns the name of an adapter's base model, or its folder if it is the recipes' default model."""
    name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    return find_language_model() if name == HUB_NAME else name


def ask_server(folder: Path, text: str, max_new_tokens: int) -> str:
    """Starts `transformers serve` with a folder, and returns its answer to one message of a chat.

    Raises:
        RuntimeError: The server ends before it answers, or does not start in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    words = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "serve.log"
    with log.open("w") as output, subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT) as server:
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            message = {"role": "user", "content": text}
            body = {"model": str(folder), "messages": [message], "max_tokens": max_new_tokens, "temperature": 0}
            request = Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urlopen(request, timeout=STARTING) as answer:
                return json.load(answer)["choices"][0]["message"]["content"].strip()
        finally:
            server.terminate()


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(
        f'`transformers serve` does not run, and {log} says why. It takes `pip install "transformers[serving]"`.'
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="Folder of the adapter.")
    parser.add_argument("texts", nargs="+", help="What the model reads.")
    parser.add_argument("--model_name_or_path", help="Folder or Hub id of the base model, if not that of the adapter.")
    parser.add_argument("--template", help="That of the training, with {input}. Default: the chat template.")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--export", type=Path, help="Folder to write the model with its prompt to, and to serve.")
    args = parser.parse_args(argv)

    name = args.model_name_or_path or find_base_model(args.adapter)
    config = AutoConfig.from_pretrained(name)
    tokenizer = load_tokenizer(args.adapter, config)
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype="float32")
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    prompts = [make_ids(tokenizer, args.template, text)[0] for text in args.texts]

    def write() -> list[str]:
        return generate_texts(model, tokenizer, prompts, len(prompts), args.max_new_tokens)

    with model.disable_adapter():
        without = write()
    for text, before, after in zip(args.texts, without, write(), strict=True):
        print(f"\n{text}\n  without prompt: {before}\n  with prompt:    {after}")
    if args.export is not None:
        export_standalone(model, tokenizer, args.export)
        print(f"\n`transformers serve {args.export}`: {ask_server(args.export, args.texts[0], args.max_new_tokens)}")


if __name__ == "__main__":
    main()
