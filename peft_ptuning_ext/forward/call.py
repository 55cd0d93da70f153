# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""One call of the backbone: its arguments, read once, and the checks that do not depend on where the prompt stands."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn
from transformers import Cache

from ..backbone import PACKING_INPUTS, REFUSED_INPUTS, UNTOUCHED_INPUTS, Backbone
from ..prompts.choice import Names, Rows, describe
from ..prompts.prompt import Prompt
from .cache import CacheWithPrompt, StaticCacheBesidePrompt, clear_prompt, full_view


@dataclass(frozen=True)
class Call:
    """What a backbone was asked for. No shape includes the prompt, except that of a cache which holds one.

    Args:
        stack (`str`): Name of the backbone's class, for messages.
        backbone ([`Backbone`]): Facts about it.
        given (`dict`): All arguments by name.
        tokens (`torch.Tensor`, *optional*):
            Token ids (B, S) or embeddings (B, S, H); `None` if neither or both were given.
        is_embedded (`bool`): Whether `tokens` are embeddings.
        mask (`Any`): The attention mask, (B, N) or a richer one, N tokens being in the cache or new.
        given_positions (`torch.Tensor`, *optional*): The caller's positions, (B, S), or (3, B, S) of images.
        cache (`Cache`, *optional*): What came before. It reports all of its columns.
        past (`int` or `torch.Tensor`):
            How many columns the cache has filled; a tensor while compiling, and of a static cache behind a prompt.
        cached_prompt ([`Prompt`], *optional*): The prompt that the cache was filled behind.
    """

    stack: str
    backbone: Backbone
    given: dict[str, Any]
    tokens: Optional[torch.Tensor]
    is_embedded: bool
    mask: Any
    given_positions: Optional[torch.Tensor]
    cache: Optional[Cache]
    past: int | torch.Tensor
    cached_prompt: Optional[Prompt]

    @classmethod
    def read(cls, stack: nn.Module, backbone: Backbone, args: tuple, kwargs: dict) -> Call:
        """Reads the arguments of `stack.forward`.

        Raises:
            ValueError: An argument has no meaning with a prompt in front.
        """
        given = {**dict(zip(backbone.parameters, args)), **kwargs} if args else kwargs
        cache_name = backbone.cache_name
        if cache_name not in given and "past_key_values" in given:  # its name before transformers 5.24
            given = dict(given)
            given[cache_name] = given.pop("past_key_values")
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get(cache_name)
        past, cached_prompt = 0, None
        if isinstance(cache, Cache):
            cached_prompt = getattr(cache, "ptuning_prompt", None)
            if isinstance(cache, CacheWithPrompt):
                given = {**given, cache_name: full_view(cache)}
            past = given[cache_name].get_seq_length()
            if isinstance(past, torch.Tensor):
                # A static cache counts in this very tensor while the layers run. Asking for its value would wait.
                is_asked = not torch.compiler.is_compiling() and not isinstance(cache, StaticCacheBesidePrompt)
                past = int(past) if is_asked else past.clone()
            if cached_prompt is not None and not isinstance(past, torch.Tensor) and past == 0:
                clear_prompt(cache)  # it was reset
                given, cached_prompt = {**given, cache_name: cache}, None
        return cls(
            type(stack).__name__,
            backbone,
            given,
            tokens=ids if embeds is None else embeds if ids is None else None,
            is_embedded=embeds is not None,
            mask=given.get("attention_mask"),
            given_positions=given.get("position_ids"),
            cache=given[cache_name] if isinstance(cache, Cache) else None,
            past=past,
            cached_prompt=cached_prompt,
        )

    def embeds(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The embeddings of the text, (B, S, H); `embed` makes them of token ids."""
        return self.tokens if self.is_embedded else embed(self.tokens)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """All arguments by name, some of them changed."""
        return {**self.given, **changes}

    def positions(self) -> Optional[torch.Tensor]:
        """The text's positions; those that padding does not change where none were given; `None`: the model's own."""
        if self.given_positions is None and self.mask is not None and self.backbone.counts_tokens:
            return count_positions(self.mask) + self.backbone.first_position
        return self.given_positions

    @property
    def plain_mask(self) -> Optional[torch.Tensor]:
        """The 2-D mask (B, N) of masks by kind of layer, which some models make of it; `None` if it can't be told."""
        mask = self.mask
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return mask
        of_all = mask.get("full_attention") if isinstance(mask, dict) else None
        if not isinstance(of_all, torch.Tensor):
            return None
        if of_all.dim() == 2:  # flash attention's is of padding only
            return of_all
        seen = of_all[:, 0, -1]  # by the last token: all but padding
        return seen if seen.dtype == torch.bool else seen == 0

    @property
    def packing(self) -> list[str]:
        """Names of the arguments given that describe several texts in one row."""
        return [key for key in PACKING_INPUTS if self.given.get(key) is not None]

    @property
    def is_packed(self) -> bool:
        """Whether positions start anew within a row, the way transformers recognises packed texts."""
        positions = self.given_positions
        if positions is None or positions.dim() != 2 or torch.compiler.is_compiling():
            return False
        if self.mask is not None or self.given.get(self.backbone.cache_name) is not None:
            return False
        return bool((positions.diff(dim=-1) != 1).any())

    def check_names(self) -> None:
        """Refuses arguments that speak of positions or lengths in ways that have no rule for a prompt."""
        for name in REFUSED_INPUTS:
            if self.given.get(name) is not None:
                raise ValueError(f"{self.stack} got `{name}`, for which P-tuning has no rule.")
        if not self.is_embedded and self.tokens.dim() != 2:
            raise ValueError(f"{self.stack} got `input_ids` of shape {tuple(self.tokens.shape)}, not (B, S).")

    def check_cache(self, names: Names | Rows) -> None:
        """Refuses to go on under one adapter behind a cache that was filled under another."""
        cached_prompt = self.cached_prompt
        # While compiling, how much a static cache holds can't be told; what it was filled behind can.
        is_filled = cached_prompt is not None or (not isinstance(self.past, torch.Tensor) and self.past > 0)
        filled = () if cached_prompt is None else cached_prompt.names
        if is_filled and filled != names:
            before, now = (describe(each) for each in (filled, names))
            raise ValueError(
                f"The cache was filled under {before}, and now {now} is active. Begin with an empty cache."
            )

    def check_packing(self) -> None:
        """Refuses the arguments of packing where attention does not read positions."""
        if packing := self.packing:
            raise ValueError(
                f"{self.stack} got `{packing[0]}`: several texts packed into one row, of which only the first would "
                "see the prompt. Pass one text per row, padded, with an attention mask, or, where the prompt is "
                "shared, `position_ids` that begin anew with each text."
            )

    def check_per_token(self, known: Collection[str]) -> None:
        """Refuses inputs with one value for each token, except those `known`: a virtual token's value is not known."""
        batch_size, text = self.tokens.shape[:2]
        for name, value in self.given.items():
            if name in known or name in UNTOUCHED_INPUTS or not isinstance(value, torch.Tensor):
                continue
            if tuple(value.shape[:2]) == (batch_size, text) and (text > 1 or value.dim() > 2):
                raise ValueError(
                    f"{self.stack} got the per-token input `{name}` of shape {tuple(value.shape)}, for which P-tuning "
                    "has no rule: what a virtual token's value should be is not known."
                )

    def check_one_text(self) -> None:
        """Refuses rows in which positions begin anew, where only the first text would see the prompt."""
        if self.backbone.is_causal and self.is_packed:
            raise ValueError(
                f"{self.stack} got several texts packed into one row, of which only the first would see the prompt. "
                "Pass one text per row, padded, with an attention mask."
            )

    def check_lengths(self, before: int, length: int | torch.Tensor, mask: Optional[torch.Tensor]) -> None:
        """Refuses a mask that is too short, and a text that has no positions left.

        Args:
            before (`int`): How many of the user's tokens are in the cache.
            length (`int` or `torch.Tensor`): V, or how many positions the prompt of each row takes, (B, 1).
            mask (`torch.Tensor`, *optional*): The 2-D mask.
        """
        new = self.tokens.shape[1]
        if mask is not None and mask.shape[1] < before + new:
            raise ValueError(
                f"The attention mask covers {mask.shape[1]} tokens, but the cache holds {before} and {new} are new. "
                "Pass a mask of all of the user's tokens, without the virtual ones."
            )
        text, limit = before + new, self.backbone.max_positions
        if limit is None:
            return
        if isinstance(length, torch.Tensor):  # the longest row is the one that counts
            texts = mask.sum(-1) if mask is not None and self.backbone.counts_tokens else text
            row = int((length[:, 0] + texts).argmax())
            text, length = texts if isinstance(texts, int) else int(texts[row]), int(length[row])
        elif text + length > limit and mask is not None and self.backbone.counts_tokens:
            text = int(mask.sum(-1).max())  # padding takes no position
        if text + length > limit:
            raise ValueError(
                f"{length} virtual tokens and {text} text tokens are {length + text} positions, and {self.stack} has "
                f"{limit}. Truncate the text to {limit - length} tokens."
            )


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count the unmasked tokens only, as `generate` makes them: (B, S) → (B, S); masked ones get 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def leading_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """How many zeros each row of a mask (B, S) begins with: (B, 1)."""
    return (attention_mask.long().cumsum(-1) == 0).sum(-1, keepdim=True)
