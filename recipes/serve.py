# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Serves a base model and many prompts behind OpenAI's API. The `model` of a request is the name of a prompt.

pip install -e ".[recipes]" "transformers[serving]"
python recipes/serve.py --adapters restaurants=outputs/restaurants
python recipes/serve.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --bank outputs/bank --port 8000

The server is that of transformers (`transformers serve --continuous-batching`): requests of different prompts are
computed in one batch, and blocks of its cache that begin with the same prompt are computed once. All prompts are rows
of its vocabulary (`export_standalone`). What is here finds the prompt of a request and puts its ids in front. The base
model's own name stands for no prompt.

Continuous batching samples all requests alike. `--temperature` and `--top_p` say how, and a request that asks for
something else gets an error.
"""

import argparse
import json
import re
import tempfile
import time
import uuid
import warnings
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from peft import PeftConfig
from shared.language_model import HUB_NAME, find_language_model, public_name
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState

from peft_ptuning_ext import PromptBank, export_standalone
from peft_ptuning_ext.bank import base_model_name


# PEFT 0.21 itself reads the old name while it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# What all requests have in common, and what of a request would change it.
SAMPLING = ("temperature", "top_p")
FOR_ALL = (*SAMPLING, "seed", "generation_config")
# What transformers' server leaves out in silence, and what it does; clients send some of these values by themselves.
ONLY = {"n": 1, "best_of": 1, "stop": [], "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}
ONLY |= {"echo": False, "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}}
ONLY |= {"tool_choice": "auto", "previous_response_id": None, "conversation": None}
# The kinds of parts of a message that are no text.
OTHER_PARTS = re.compile("(input_)?(image|audio|video|file)(_url)?")
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# What is raised where a field of a request has another type than it should.
MALFORMED = (AttributeError, LookupError, TypeError, ValueError, TemplateError)
# Paths of transformers' server with which a client could load other models, or drop this one.
NOT_SERVED = ("/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions")


class InFront(BaseGenerateManager):
    """Generates behind the ids of one prompt.

    Args:
        manager (`BaseGenerateManager`): What generates for all prompts.
        ids (`list[int]`): The prompt's, V of them.
        limit (`int`): How many positions the model has.
        first (`int`): The first id of all prompts, behind those of texts.
    """

    def __init__(self, manager: BaseGenerateManager, ids: list[int], limit: int, first: int) -> None:
        self.manager, self.ids, self.limit, self.first = manager, ids, limit, first

    def init_cb(self, model, gen_config) -> None:
        self.manager.init_cb(model, gen_config)

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, **kwargs):
        inputs = self._put_in_front(inputs, gen_config)
        return self.manager.generate_streaming(model, processor, inputs, gen_config, _unique(request_id), **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        inputs = self._put_in_front(inputs, gen_config)
        text, length, ids = await self.manager.generate_non_streaming(
            model, processor, inputs, gen_config, _unique(request_id)
        )
        return text, length - len(self.ids), ids

    def stop(self) -> None:
        self.manager.stop()

    def _put_in_front(self, inputs: dict, gen_config) -> dict:
        if any(id >= self.first for id in inputs["input_ids"]):
            raise HTTPException(400, "The text has entries of a prompt. Only `model` says which prompt is in front.")
        ids = [*self.ids, *inputs["input_ids"]]
        if len(ids) >= self.limit:
            raise HTTPException(
                400,
                f"The text has {len(ids) - len(self.ids)} tokens and the prompt {len(self.ids)}, and the model has "
                f"{self.limit} positions for both and the answer.",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, self.limit - len(ids))
        return {"input_ids": ids}


def _unique(request_id: str) -> str:
    """Clients may choose the same id, and two requests of one id end the batches of all."""
    return f"{request_id}-{uuid.uuid4()}"


class Prompts(GenerationState):
    """By name, prompts that one model generates behind.

    Args:
        folder (`str`): The exported model.
        ids (`dict[str, list[int]]`): By name, the ids of a prompt.
        limit (`int`): How many positions the model has.
        sampling (`dict`): What all requests have in common.
        config (`ContinuousBatchingConfig`): Of the batches.
    """

    def __init__(self, folder: str, ids: dict, limit: int, sampling: dict, config: ContinuousBatchingConfig) -> None:
        super().__init__(continuous_batching=True, cb_config=config)
        self.folder, self.ids, self.limit, self.sampling = folder, ids, limit, sampling
        self.first = min(id for own in ids.values() for id in own)

    def get_manager(self, model_id: str, use_cb: bool = False) -> InFront:
        return InFront(super().get_manager(self.folder, use_cb), self.ids[model_id], self.limit, self.first)


class OfPrompts:
    """What a handler of transformers' server does otherwise here."""

    async def handle_request(self, body: dict, request_id: str):
        try:
            return await super().handle_request(body, request_id)
        except MALFORMED as error:
            message = f"A field of the request is not what the API has there: {type(error).__name__}: {error}"
            raise HTTPException(400, message) from error

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        state, name = self.generation_state, body.get("model")
        if not isinstance(name, str) or name not in state.ids:
            raise unknown(name)
        if not body.get(self.text_field):
            raise HTTPException(400, f"`{self.text_field}` is missing or empty.")
        check_parts([body[self.text_field], body.get("instructions")])
        for field in FOR_ALL:
            if body.get(field) is not None and body[field] != state.sampling.get(field):
                raise HTTPException(
                    400,
                    f"`{field}` is {body[field]!r}. This server samples all requests alike, with {state.sampling}. "
                    f"Leave `{field}` out.",
                )
        for field, value in ONLY.items():
            if body.get(field) is not None and body[field] != value:
                raise HTTPException(
                    400, f"`{field}` is {body[field]!r}. This server can't do so. Leave `{field}` out."
                )
        for field in LENGTHS:
            number = body.get(field)
            if number is not None and (type(number) is not int or number < 1):
                raise HTTPException(400, f"`{field}` must be a positive number of tokens, got {number!r}.")

    def _resolve_model(self, body: dict) -> tuple:
        name, body["model"] = body["model"], self.generation_state.folder
        return name, *super()._resolve_model(body)[1:]


class Chat(OfPrompts, ChatCompletionHandler):
    text_field = "messages"


class Completion(OfPrompts, CompletionHandler):
    text_field = "prompt"


class Response(OfPrompts, ResponseHandler):
    text_field = "input"

    async def handle_request(self, body: dict, request_id: str):
        return await super().handle_request({"stream": False, **body}, request_id)  # transformers' own streams


def unknown(name: object) -> HTTPException:
    return HTTPException(404, f"The model {name!r} does not exist. GET /v1/models lists those that do.")


def check_parts(value: object) -> None:
    """Refuses images, sound and files anywhere in messages, which transformers' server leaves out in silence.

    Raises:
        HTTPException: There is such a part.
    """
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and OTHER_PARTS.fullmatch(kind):
            raise HTTPException(400, f"A message has a part of type {kind!r}. This model reads text only.")
        value = [*value.values()]
    for part in value if isinstance(value, list) else []:
        check_parts(part)


def make_app(folder: Path, base_name: str, sampling: dict, config: ContinuousBatchingConfig, device: str) -> FastAPI:
    """The server of an exported bank.

    Args:
        folder (`Path`): What `export_standalone` has written.
        base_name (`str`): The name that stands for no prompt.
        sampling (`dict`): `temperature` and `top_p` of all requests.
        config (`ContinuousBatchingConfig`): Of the batches.
        device (`str`): Where the model computes.
    """
    table = json.loads((folder / "prompt_ids.json").read_text(encoding="utf-8"))
    ids = {base_name: []} | {name: [*range(first, first + number)] for name, (first, number) in table.items()}
    manager = ModelManager(device=device, continuous_batching=True, force_model=str(folder))
    about = {"object": "model", "created": int(time.time()), "owned_by": "peft_ptuning_ext"}
    models = [{"id": name, **about} for name in ids]
    manager.get_gen_models = manager.list_models = lambda: models  # before transformers 5.24, and since
    model, _ = manager.load_model_and_processor(manager.process_model_name(str(folder)))
    model.generation_config.update(do_sample=sampling["temperature"] > 0, temperature=sampling["temperature"] or 1.0)
    model.generation_config.update(top_p=sampling["top_p"])
    state = Prompts(str(folder), ids, model.config.max_position_embeddings, sampling, config)
    unused = TranscriptionHandler(manager, state), SystemOneHandler(manager, state)
    handlers = Chat(manager, state), Completion(manager, state), Response(manager, state)
    app = build_server(manager, *handlers, *unused, state)
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in NOT_SERVED]

    @app.get("/v1/models/{name:path}")
    def retrieve(name: str) -> dict:
        if name not in ids:
            raise unknown(name)
        return {"id": name, **about}

    app.add_exception_handler(StarletteHTTPException, answer_error)  # HTTPException is one, and so is a 405
    app.add_exception_handler(RequestValidationError, answer_error)
    return app


async def answer_error(request, error: StarletteHTTPException | RequestValidationError) -> JSONResponse:
    """An error in the form that OpenAI's clients read."""
    status = getattr(error, "status_code", 400)
    code = {404: "model_not_found"}.get(status)
    message = {"message": str(getattr(error, "detail", error)), "type": "invalid_request_error"}
    return JSONResponse({"error": {**message, "param": None, "code": code}}, status_code=status)


def collect(args: argparse.Namespace) -> tuple[PromptBank, str]:
    """The bank with all prompts, on its base model; and that model's folder or name."""
    folders = dict(pair.partition("=")[::2] for pair in args.adapters)
    if len(folders) < len(args.adapters) or not all(folders.values()):
        raise ValueError(f"`--adapters` takes name=folder for each prompt, each name once. Got {args.adapters}.")
    if not args.bank and not folders:
        raise ValueError("There is nothing to serve. Pass `--bank`, or `--adapters name=folder` for each prompt.")
    name = args.model_name_or_path
    if name is None and args.bank:
        name = base_model_name(args.bank) or None
    if name is None and folders:
        name = PeftConfig.from_pretrained(next(iter(folders.values()))).base_model_name_or_path
    name = find_language_model() if name in (None, HUB_NAME) else name
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    bank = PromptBank.from_pretrained(model, args.bank) if args.bank else PromptBank(model)
    for prompt, folder in folders.items():
        bank.add(folder, prompt)
    return bank, name


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="The base model. Default: that of the bank or first adapter.")
    parser.add_argument("--bank", help="Folder or Hub id of a prompt bank.")
    parser.add_argument("--adapters", nargs="*", default=[], metavar="NAME=FOLDER", help="Adapters to serve.")
    parser.add_argument("--temperature", type=float, default=0.0, help="Of all requests. Default: 0, the likeliest.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Of all requests.")
    parser.add_argument("--num_blocks", type=int, help="Blocks of the cache. Default: as memory allows.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)

    bank, name = collect(args)
    base_name = public_name(name)
    if base_name in bank:
        raise ValueError(f"A prompt is named {base_name!r}, as the base model is. Give it another name.")
    sampling = {field: getattr(args, field) for field in SAMPLING}
    with tempfile.TemporaryDirectory() as folder:
        export_standalone(bank, AutoTokenizer.from_pretrained(name), folder)
        print(f"Serving {len(bank)} prompts: {', '.join(list(bank)[:10])}", flush=True)
        del bank
        config = ContinuousBatchingConfig(num_blocks=args.num_blocks)
        app = make_app(Path(folder), base_name, sampling, config, args.device)
        uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
