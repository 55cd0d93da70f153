# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the package uses of PEFT, transformers, accelerate and torch without a promise that it stays.

No upper bound keeps the package from a new release of these. When a release drops a name, a test here says which name,
whose it was, and in which lines the package uses it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from families import make_model
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from releases import CHECKPOINTING
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel


ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "peft_ptuning_ext").rglob("*.py"))
OTHERS = ("accelerate", "peft", "torch", "transformers")


def _checkpointing() -> nn.Module:
    model = make_model("Llama", "CAUSAL_LM")
    getattr(model, f"{CHECKPOINTING}_enable")()
    return next(module for module in model.modules() if hasattr(module, "gradient_checkpointing"))


def _with_gradients_of_inputs() -> nn.Module:
    model = make_model("Llama", "CAUSAL_LM")
    model.enable_input_require_grads()
    return model


def _keeping_a_manager() -> nn.Module:
    model = make_model("Llama", "CAUSAL_LM")
    settings = ContinuousBatchingConfig(page_size=4, num_blocks=8, max_batch_tokens=8)
    greedy = GenerationConfig(max_new_tokens=1, eos_token_id=-1)
    model.generate_batch([[5]], greedy, settings, persistent_manager=True)
    return model


# The private names of others that the package reads, overrides or sets, with what makes an object that has the name.
PRIVATE_NAMES: dict[str, Callable[[], Any]] = {
    # PEFT calls these of a tuner.
    "_cast_adapter_dtype": lambda: BaseTuner,
    "_check_merge_allowed": lambda: BaseTuner,
    "_check_target_module_exists": lambda: BaseTuner,
    "_create_and_replace": lambda: BaseTuner,
    "_get_adapter_state_dict": lambda: BaseTuner,
    "_prepare_adapter_config": lambda: BaseTuner,
    "_remap_adapter_state_dict_for_load": lambda: BaseTuner,
    "_remove_adapter_name_from_key": lambda: BaseTuner,
    "_unload_and_optionally_merge": lambda: BaseTuner,
    "_enable_peft_forward_hooks": lambda: PeftModel,
    # It calls or reads these of a tuner layer.
    "_active_adapter": lambda: BaseTunerLayer,
    "_disable_adapters": lambda: BaseTunerLayer,
    "_move_adapter_to_device_of_base_layer": lambda: BaseTunerLayer,
    "_get_available_adapters": lambda: BaseTunerLayer,
    "_adapters": lambda: ModulesToSaveWrapper(nn.Linear(1, 1), "default"),
    "_split_kwargs": lambda: PeftConfig,
    "_attn_implementation": PreTrainedConfig,
    "_supports_attention_backend": lambda: PreTrainedModel,
    "_gradient_checkpointing_func": _checkpointing,
    "_hf_hook": lambda: add_hook_to_module(nn.Linear(1, 1), ModelHook()),
    "_old_forward": lambda: add_hook_to_module(nn.Linear(1, 1), ModelHook()),
    "_hf_peft_config_loaded": lambda: PreTrainedModel,
    "_require_grads_hooks": _with_gradients_of_inputs,
    "_cached_continuous_batching_manager": _keeping_a_manager,
    "_orig_mod": lambda: torch.compile(nn.Linear(1, 1)),
    "_apply": lambda: nn.Module,
    "_forward_hooks": lambda: nn.Linear(1, 1),
    "_forward_pre_hooks": lambda: nn.Linear(1, 1),
    "_parameters": nn.Module,
    "_buffers": nn.Module,
    "_is_replica": lambda: nn.Linear(1, 1)._replicate_for_data_parallel(),
    "_version": lambda: torch.zeros(1),
    "_scaled_dot_product_flash_attention_for_cpu": lambda: torch.ops.aten,
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda: torch.ops.aten,
}


class _Names(ast.NodeVisitor):
    """Collects a file's private attributes: (name, place) of each that it reads, and of each that it gives."""

    def __init__(self, path: Path):
        self.path = path
        self.read: list[tuple[str, str]] = []
        self.given: list[tuple[str, str]] = []
        self.visit(ast.parse(path.read_text()))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        is_given = isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) in ("self", "cls")
        self._note(node.attr, node, self.given if is_given else self.read)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """A string, as in `getattr(x, "_name")` or `"_name" in vars(x)`."""
        self._note(node.value, node, self.read)

    def visit_Call(self, node: ast.Call) -> None:
        """`vars(x).setdefault("_name", …)` and `setattr(x, "_name", …)` give a name."""
        if getattr(node.func, "attr", getattr(node.func, "id", None)) in ("setdefault", "setattr"):
            for argument in node.args:
                self._note(getattr(argument, "value", None), node, self.given)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in node.body:
            if isinstance(child, ast.FunctionDef):
                self._note(child.name, child, self.given)
        self.generic_visit(node)

    def _note(self, name: Any, node: ast.AST, where: list[tuple[str, str]]) -> None:
        if isinstance(name, str) and re.fullmatch(r"_[a-z]\w*", name):
            where.append((name, f"{self.path.relative_to(ROOT)}:{node.lineno}"))


NAMES = [_Names(path) for path in FILES]


def _places(name: str) -> list[str]:
    return sorted({place for names in NAMES for found, place in names.read + names.given if found == name})


def _classes() -> Iterator[tuple[type, list[type]]]:
    """The package's classes, each with the classes of others that it inherits from."""
    for path in FILES:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__:
                yield cls, [base for base in cls.__mro__ if base.__module__.partition(".")[0] in OTHERS]


def _private_names_of_others() -> set[str]:
    """Those that the package reads without having given them, gives without reading, or finds in a base class."""
    read = {name for names in NAMES for name, _ in names.read}
    given = {name for names in NAMES for name, _ in names.given}
    bases = {base for _, of_others in _classes() for base in of_others}
    return (read ^ given) | {name for name in read & given if any(hasattr(base, name) for base in bases)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_private_names_are_there(name) -> None:
    owner = PRIVATE_NAMES[name]()
    whose = owner.__name__ if isinstance(owner, type) else f"a {type(owner).__name__}"
    assert hasattr(owner, name), f"{name!r} of {whose} is gone. It is used in {_places(name)}."


def test_all_private_names_are_listed() -> None:
    found = _private_names_of_others()
    missing = {name: _places(name) for name in sorted(found - PRIVATE_NAMES.keys())}
    assert not missing, f"Private names of other packages that `PRIVATE_NAMES` lacks, and where they are: {missing}"
    assert not (unused := PRIVATE_NAMES.keys() - found), f"The package uses these no longer: {sorted(unused)}"


def _imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) for each name that a file takes from a module of others, by import or as `module.name`."""
    tree, modules = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.module, alias.name, node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, dot, rest = ast.unparse(node.value).partition(".")
            if (module := f"{modules.get(root)}{dot}{rest}") in sys.modules:
                yield module, node.attr, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "peft_ptuning_ext").as_posix())
def test_imported_names_are_there(path) -> None:
    """Public or not: several are in modules that no document mentions."""
    for module, name, line in _imports(path):
        if module.partition(".")[0] in OTHERS:
            assert _has(module, name), f"{module}.{name} is gone. It is used in {path.relative_to(ROOT)}:{line}."


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def test_overrides_take_what_the_base_class_takes() -> None:
    """PEFT passes arguments by name: an override has to know those of the method that it stands for."""
    for cls, bases in _classes():
        for name, method in vars(cls).items():
            base = next((vars(base)[name] for base in bases if name in vars(base)), None)
            method, base = (getattr(function, "__func__", function) for function in (method, base))
            if not (inspect.isfunction(method) and inspect.isfunction(base)) or name == "__init__":
                continue
            ours, theirs = (inspect.signature(function).parameters for function in (method, base))
            if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours.values()):
                continue
            kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            missing = [key for key, parameter in theirs.items() if key not in ours and parameter.kind not in kinds]
            assert not missing, f"{cls.__name__}.{name} lacks {missing}, which {base.__qualname__} takes."
