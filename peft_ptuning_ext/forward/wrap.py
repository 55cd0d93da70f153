# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Begin here: the backbone's `forward` is wrapped, and `run` is what becomes of one call.

The wrapped `forward` takes everything from the module that it is called on, and `run` itself stores nothing. So
a copied, pickled or replicated model, and several threads on one model, are right.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backbone import Backbone
from ..prompts.adapter import ATTACHMENT, find_stack, layer_of
from ..prompts.choice import Names, Rows
from . import deep, deep_decoder, in_attention, in_place, in_row, one_pass, paged, rows
from .attention import adapt_attention, restore_attention
from .call import Call
from .deep_decoder import DeepDecoder
from .in_attention import NotRecorded, StoredStates
from .sequence_parallel import check_whole_texts


@dataclass
class Attachment:
    """What a backbone with prompts carries, at `stack.ptuning`.

    Args:
        backbone ([`Backbone`]): Facts about it.
        states ([`StoredStates`]): Keys and values of prompts, stored between calls without gradients.
        not_recorded (`str`, *optional*): Why keys and values can't be computed apart, as a first pass has shown.
        decoder_hook (`RemovableHandle`, *optional*): The hook on the decoder that attends to this backbone.
        own_forward (`Callable`, *optional*): A `forward` that the module itself had, rather than its class.
        deep_decoder ([`~peft_ptuning_ext.forward.deep_decoder.DeepDecoder`], *optional*):
            The decoder that attends to this backbone, if it takes deep prompts of its own.
    """

    backbone: Backbone
    states: StoredStates = field(default_factory=StoredStates)
    not_recorded: Optional[str] = None
    decoder_hook: Optional[RemovableHandle] = None
    own_forward: Optional[Callable] = None
    deep_decoder: Optional[DeepDecoder] = None


def run(stack: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """One call of a backbone: what was asked, what is in front of it, and how both meet.

    Args:
        stack (`nn.Module`): The backbone.
        forward (`Callable`): Its own `forward`.
        args (`tuple`), kwargs (`dict`): What it was called with.
    """
    attachment = stack.ptuning
    if paged.is_paged(kwargs):
        return paged.run(stack, forward, {**dict(zip(attachment.backbone.parameters, args)), **kwargs})
    layer = layer_of(stack)
    names = layer.prompt_names
    call = Call.read(stack, attachment.backbone, args, kwargs)
    if isinstance(names, Rows) and call.tokens is not None:
        names = names.of_call(call.stack, len(call.tokens))
    call.check_cache(names)
    if not names or call.tokens is None:  # the model has its own error for no text, and for two
        return forward(**call.given)
    call.check_names()
    if (cached_prompt := call.cached_prompt) is not None and cached_prompt.states is not None:
        if not in_attention.takes_prompt(stack):
            raise ValueError(
                "The cache was filled behind a shared prompt, and the attention implementation was then changed to "
                f"{stack.config._attn_implementation!r}, which does not see it. Begin with an empty cache."
            )
        return in_attention.run(forward, call, cached_prompt)
    why = functools.partial(why_in_row, stack, names)
    check_whole_texts(call.stack)
    if not isinstance(names, Rows) and layer.placeholder_of(names) is not None:
        return in_place.run(forward, call, layer, names, layer.dtype or stack.dtype)
    if cached_prompt is not None:
        return in_row.go_on(forward, call, why)
    dtype = call.tokens.dtype if call.is_embedded else layer.dtype or stack.dtype
    if isinstance(names, Rows) or len({layer.is_deep(name) for name in names}) > 1:
        return rows.run(stack, forward, call, layer, names, dtype, why)
    if layer.is_deep(names[0]):
        return deep.run(stack, forward, call, layer.make_deep_prompt(names, dtype), layer.embed)
    prompt = layer.make_prompt(names, dtype)
    if why() is None:
        try:
            if not one_pass.is_due(stack, call):
                stored = in_attention.open_stored(stack, prompt.vectors.device)
                (shared,) = in_attention.with_states(stack, forward, [prompt], stored)
                return in_attention.run(forward, call, shared)
            if torch.is_grad_enabled():  # training may write through `.data`, which leaves no trace
                attachment.states.drop(*names)
            if not one_pass.costs_more(call, prompt):
                return one_pass.run(stack, forward, call, prompt, call.embeds(layer.embed))
        except NotRecorded as reason:
            attachment.not_recorded = str(reason)
    return in_row.begin(stack, forward, call, prompt, call.embeds(layer.embed), why)


def why_in_row(stack: nn.Module, names: Names | Rows = ()) -> Optional[str]:
    """Why the prompt stands in each row now; `None` if its keys and values are put in front in attention."""
    attachment = stack.ptuning
    backbone = attachment.backbone
    if isinstance(names, Rows) and names.differ_inside:
        return "rows have other modules inside the backbone than others (`modules_to_save`)"
    found = backbone.not_in_attention or backbone.not_recorded or attachment.not_recorded
    return found or in_attention.why_not(stack)


def attach(model: nn.Module, backbone: Backbone) -> None:
    """Wraps the `forward` of the backbone in `model`; `detach` undoes it. After an error nothing is changed."""
    stack = model.get_submodule(backbone.name)
    decoder = None if backbone.decoder is None else model.get_submodule(backbone.decoder)
    attachment, wrapped = Attachment(backbone), _wrapped_class(type(stack))
    setattr(stack, ATTACHMENT, attachment)
    try:
        # Accelerate's hooks put a `forward` on the module itself, and what that calls at `_old_forward`.
        name = "_old_forward" if "_old_forward" in vars(stack) else "forward"
        if (own := vars(stack).get(name)) is not None:
            if getattr(own, "__func__", None) is not type(stack).forward:
                attachment.own_forward = own
            setattr(stack, name, MethodType(wrapped.forward, stack))
        stack.__class__ = wrapped
        if decoder is not None:
            hook = functools.partial(in_row.widen_encoder_mask, stack)
            attachment.decoder_hook = decoder.register_forward_pre_hook(hook, with_kwargs=True)
        if backbone.not_in_attention is None and backbone.not_recorded is None:
            adapt_attention(stack)
        paged.attach(model)
    except BaseException:
        detach(model)
        raise


def detach(model: nn.Module) -> None:
    """Gives the backbone in `model` its own `forward` back."""
    stack = find_stack(model)
    attachment = getattr(stack, ATTACHMENT)
    wrapped = next((c for c in type(stack).__mro__ if "ptuning_wraps" in vars(c)), None)
    if wrapped is not None:
        for name in ("_old_forward", "forward"):
            if getattr(vars(stack).get(name), "__func__", None) is not wrapped.forward:
                continue
            if attachment.own_forward is not None:
                setattr(stack, name, attachment.own_forward)
            elif name == "forward":
                del stack.forward
            else:
                setattr(stack, name, MethodType(wrapped.ptuning_wraps.forward, stack))
        stack.__class__ = _without(wrapped, type(stack))
    if attachment.decoder_hook is not None:
        attachment.decoder_hook.remove()
    restore_attention(stack)
    paged.detach(model)
    deep.leave_prompts(stack)
    deep_decoder.leave_prompts(stack)
    delattr(stack, ATTACHMENT)


# The backbone whose own `forward` is running, if it has one that is not its class's.
_running_own: ContextVar[Optional[nn.Module]] = ContextVar("running_own", default=None)


@functools.cache
def _wrapped_class(original: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name whose `forward` is `run`. A copy of a module has its class, and so is wrapped, too."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attachment, forward = getattr(self, ATTACHMENT, None), functools.partial(original.forward, self)
        if attachment is None:  # a `forward` that somebody has kept since before `detach`
            return forward(*args, **kwargs)
        if attachment.own_forward is None:
            return run(self, forward, args, kwargs)
        if _running_own.get() is self:  # the module's own `forward` calls that of its class
            return forward(*args, **kwargs)
        token = _running_own.set(self)
        try:
            return run(self, attachment.own_forward, args, kwargs)
        finally:
            _running_own.reset(token)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        # Somebody who had put a `forward` on the module puts the class's back, perhaps without its decorators. The
        # class's is `run` now.
        function = getattr(value, "__func__", None) if name == "forward" else None
        if function is None or inspect.unwrap(function) is not inspect.unwrap(original.forward):
            original.__setattr__(self, name, value)
            return
        if function is not forward:
            self.ptuning.own_forward = None
        vars(self).pop("forward", None)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        return _rebuild, (original,), self.__getstate__()

    body = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"forward": forward, "__setattr__": __setattr__, "__reduce_ex__": __reduce_ex__}
    body["ptuning_wraps"] = original
    return type(original.__name__, (original,), body)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    wrapped = _wrapped_class(original)
    return wrapped.__new__(wrapped)


def _without(wrapped: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` as it would be without `wrapped`, from which others may have derived it (FSDP2 does)."""
    if cls is wrapped:
        return wrapped.ptuning_wraps
    if wrapped not in cls.__mro__:
        return cls
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(_without(wrapped, base) for base in cls.__bases__), body)
