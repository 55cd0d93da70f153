# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`ClozeClassifier`: a classifier whose head is the language model's own, read at the words that stand for classes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto import modeling_auto

from .template import PromptTemplate


CALIBRATIONS = (None, "contextual", "trained")

# Inputs that say nothing (Zhao et al., 2021, section 5). The last is one for causal models only: a masked model would
# take it for a mask.
CONTENT_FREE = ("N/A", "", "[MASK]")

# What trainers and PEFT ask the model itself about running layers again in the backward pass. Releases of transformers
# have some of these names, with `activation` in place of `gradient` since 5.23.
OF_LANGUAGE_MODEL = (
    *("gradient_checkpointing_enable", "gradient_checkpointing_disable", "is_gradient_checkpointing"),
    *("activation_checkpointing_enable", "activation_checkpointing_disable", "is_activation_checkpointing"),
    *("enable_input_require_grads", "disable_input_require_grads"),
)


class Calibration(nn.Module):
    """What is done to the scores of C classes: nothing, a fixed bias (`"contextual"`), or a trained scale and bias.

    Args:
        size (`int`): C.
        kind (`str`, *optional*): One of `CALIBRATIONS`.
    """

    def __init__(self, size: int, kind: Optional[str]):
        super().__init__()
        self.kind = kind
        if kind == "trained":
            self.weight = nn.Parameter(torch.ones(size))
            self.bias = nn.Parameter(torch.zeros(size))
        elif kind == "contextual":
            self.register_buffer("bias", torch.zeros(size))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, C) → logits (B, C)."""
        if self.kind is None:
            return scores
        return scores * self.weight + self.bias if self.kind == "trained" else scores + self.bias


class ClozeClassifier(nn.Module):
    """Classifies by the words that a language model expects: at its mask, or behind the text of a causal model.

    The score of a class is the log of the probability that any of its words stands there, log Σ p(word): a further
    word never lowers it, as a mean would. Words of several tokens count in full. A causal model gives their
    probability, the product over their tokens, in one pass over all words. A masked model reads each word at as many
    masks as the word has tokens, in one pass for each length. There the mean of the log-probabilities is taken,
    because masks that are filled at once do not make a probability of the whole, and their sum would favour short
    words.

    `get_peft_model(cloze, PTuningConfig(task_type="SEQ_CLS", prompt_template=template))` makes it trainable. The words
    and the calibration are saved with the adapter, and [`~ClozeClassifier.from_pretrained`] loads them.

    Args:
        model (`PreTrainedModel`): A masked or a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        label_words (`Mapping[str, Sequence[str]]`): The words of each class. Their order numbers the classes.
        calibration (`str`, *optional*):
            `"contextual"`: the log-probabilities of the classes for inputs that say nothing are subtracted, once
            [`~ClozeClassifier.calibrate`] has been called (Zhao et al., 2021,
            https://huggingface.co/papers/2102.09690). `"trained"`: a scale and a bias for each class, trained and
            saved with the adapter.
        word_prefix (`str`, defaults to `" "`): What stands between the text and the word.

    Raises:
        ValueError:
            The model is no language model of these kinds, a masked one's tokenizer has no mask, there are less than
            two classes, or a word is empty, unknown to the tokenizer, or that of another class too.
        TypeError: A value has the wrong type.
    """

    input_modalities = ("text",)  # a pipeline shows it
    base_model_prefix = "lm"  # PEFT asks where the model is whose weights have other names in older files
    repeats_rows = True  # `adapter_names` asks: a causal model reads each text once for each beginning of a word

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label_words: Mapping[str, Sequence[str]],
        calibration: Optional[str] = None,
        word_prefix: str = " ",
    ):
        super().__init__()
        pairs = _as_pairs(label_words)
        settings = {"label_words": pairs, "calibration": calibration, "word_prefix": word_prefix}
        self.cloze_settings = check_settings(settings)
        name = type(model).__name__
        self.is_masked = name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        is_causal = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        if not (self.is_masked or is_causal) or model.config.is_encoder_decoder:
            raise ValueError(
                f"{name} is no masked or causal language model. Load one with `AutoModelForMaskedLM` or "
                "`AutoModelForCausalLM`."
            )
        if self.is_masked and tokenizer.mask_token_id is None:
            raise ValueError(f"{name} reads words at masks, and this {type(tokenizer).__name__} has no mask token.")
        self.lm = model
        self.tokenizer = tokenizer
        self.words = _tokenize_words(tokenizer, label_words, word_prefix)
        self.score = Calibration(len(label_words), calibration)
        self.config = copy.deepcopy(model.config)
        self.config.id2label = dict(enumerate(label_words))
        self.config.label2id = {label: i for i, label in enumerate(label_words)}
        self.config.problem_type = "single_label_classification"
        self.name_or_path = model.name_or_path

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_id: str, **kwargs: Any
    ) -> PeftModel:
        """Loads an adapter that was trained on a classifier of this kind.

        Args:
            model (`PreTrainedModel`): The language model that it was trained on.
            tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
            model_id (`str`): Folder of the adapter, or repository on the Hub.
            kwargs: For [`~peft.PeftModel.from_pretrained`].

        Raises:
            ValueError: The adapter is another kind of adapter, or does not fit the model or the tokenizer.
        """
        config = PeftConfig.from_pretrained(model_id)
        settings = getattr(config, "cloze", None)
        if settings is None:
            raise ValueError(f"The adapter {model_id} was not trained on a ClozeClassifier: its config has no words.")
        if config.prompt_template is not None:
            config.prompt_template.for_tokenizer(tokenizer)  # for its checks
        settings = {**settings, "label_words": dict(settings["label_words"])}
        return PeftModel.from_pretrained(cls(model, tokenizer, **settings), model_id, **kwargs)

    @property
    def num_masks(self) -> int:
        """How many masks a row of a masked model has: the tokens of the longest word."""
        return max(len(ids) for words in self.words for ids in words)

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.lm.device

    def __getattr__(self, name: str) -> Any:
        if name in OF_LANGUAGE_MODEL:
            return getattr(self.lm, name)
        return super().__getattr__(name)

    def can_generate(self) -> bool:
        """A classifier writes no texts."""
        return False

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Classifies texts of S tokens.

        Args:
            input_ids (`torch.Tensor`): (B, S); a masked model's with [`~ClozeClassifier.num_masks`] masks in each row.
            attention_mask (`torch.Tensor`, *optional*): (B, S), all ones by default.
            token_type_ids (`torch.Tensor`, *optional*): (B, S).
            labels (`torch.Tensor`, *optional*): Numbers of the classes, (B,), for the cross-entropy.
            return_dict (`bool`, *optional*): With `False`, a tuple is returned.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: with logits (B, C), and the loss if there are
            labels.

        Raises:
            ValueError: A row has another number of masks, or an argument has no meaning here.
        """
        if input_ids is None or inputs_embeds is not None or output_attentions or output_hidden_states:
            raise ValueError(
                "A ClozeClassifier takes `input_ids`, in which it finds the mask or the end of a text, and returns "
                "logits alone: no `inputs_embeds`, `output_attentions` or `output_hidden_states`."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.score(self.class_scores(input_ids, mask, token_type_ids))
        loss = None if labels is None else cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def class_scores(
        self, input_ids: torch.Tensor, mask: torch.Tensor, token_type_ids: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """The log-probabilities of the classes' words, before calibration: (B, S) → (B, C), float32."""
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        scores = self._at_masks(inputs) if self.is_masked else self._behind_texts(inputs)
        return torch.stack([torch.stack([scores[ids] for ids in words]).logsumexp(0) for words in self.words], dim=-1)

    @torch.no_grad()
    def calibrate(
        self, template: PromptTemplate, content_free: Sequence[str] = CONTENT_FREE, keep_slots: bool = True
    ) -> torch.Tensor:
        """Sets the bias of `calibration="contextual"`: minus the log of what inputs that say nothing are taken for.

        Call it before the training, which then begins with classes that are equally likely. After the training it
        would take away some of what was learned.

        Args:
            template ([`PromptTemplate`]): What makes an input of a text; the text is put into each of its columns.
            content_free (`Sequence[str]`): Texts that say nothing. Those that hold a mask are left out for a masked
                model.
            keep_slots (`bool`, defaults to `True`): `False` for a model without the prompt.

        Returns:
            `torch.Tensor`: The bias, (C,).

        Raises:
            ValueError: The calibration is another one.
        """
        calibration = self._active_calibration()
        if calibration.kind != "contextual":
            raise ValueError(f"`calibrate` is for calibration='contextual', and this one is {calibration.kind!r}.")
        texts = [text for text in content_free if not (self.is_masked and self.tokenizer.mask_token in text)]
        encode = template.map_function(self.tokenizer, num_masks=self.num_masks, keep_slots=keep_slots)
        batch = self.tokenizer.pad(encode(dict.fromkeys(template.columns, texts)), return_tensors="pt").to(self.device)
        was_training = self.training
        self.eval()
        try:
            scores = self.class_scores(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        finally:
            self.train(was_training)
        calibration.bias.copy_(-scores.softmax(-1).mean(0).log())
        return calibration.bias.clone()

    def _active_calibration(self) -> Calibration:
        wrapper = self.score
        if not isinstance(wrapper, ModulesToSaveWrapper):
            return wrapper
        names = [] if wrapper.disable_adapters else wrapper.active_adapters
        return wrapper.modules_to_save[names[0]] if names else wrapper.original_module

    def _at_masks(self, inputs: dict[str, torch.Tensor]) -> dict[tuple[int, ...], torch.Tensor]:
        """By word, the mean of its log-probabilities at its masks, (B,): a pass for each length of words."""
        is_mask = inputs["input_ids"] == self.tokenizer.mask_token_id
        longest = self.num_masks
        if not torch.compiler.is_compiling():
            for row, count in enumerate(is_mask.sum(1).tolist()):
                if count != longest:
                    raise ValueError(
                        f"Row {row} of `input_ids` has {count} masks, and the longest word has {longest} tokens. "
                        f"Encode rows with `template.map_function(tokenizer, num_masks={longest})`."
                    )
        scores = {}
        for length in {len(ids) for words in self.words for ids in words}:
            # A word is read in a row that has just its masks. The others go to the end, behind the attention mask.
            surplus = is_mask & (is_mask.cumsum(1) > length)
            order = surplus.long().argsort(dim=1, stable=True)
            shorter = {name: value.gather(1, order) for name, value in inputs.items()}
            shorter["attention_mask"] = shorter["attention_mask"].masked_fill(surplus.gather(1, order), 0)
            logits = self.lm(**shorter).logits
            columns = (is_mask & ~surplus).gather(1, order).long().argsort(dim=1, descending=True, stable=True)
            columns = columns[:, :length]
            # (B, length, vocabulary)
            at_masks = logits.take_along_dim(columns[..., None], dim=1).float().log_softmax(-1)
            for ids in (ids for words in self.words for ids in words if len(ids) == length):
                scores[ids] = torch.stack([at_masks[:, i, token] for i, token in enumerate(ids)]).mean(0)
        return scores

    def _behind_texts(self, inputs: dict[str, torch.Tensor]) -> dict[tuple[int, ...], torch.Tensor]:
        """By word, its log-probability behind the text, (B,): one pass over each text with the beginnings of words."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # (B,), of the unmasked tokens
        self._check_end(ids, last, mask)
        beginnings = list(dict.fromkeys(word[:-1] for words in self.words for word in words))
        room = max(len(beginning) for beginning in beginnings)
        columns = last[:, None] + torch.arange(room + 1, device=ids.device)  # (B, room+1), where words are read
        rows = {name: [] for name in inputs}
        for beginning in beginnings:
            places = columns[:, 1 : len(beginning) + 1]
            values = {"input_ids": ids.new_tensor(beginning), "attention_mask": mask.new_ones(len(beginning))}
            for name, value in inputs.items():
                longer = torch.cat([value, value.new_zeros(len(value), room)], dim=1)
                added = values.get(name, value.new_zeros(len(beginning)))
                rows[name].append(longer.scatter(1, places, added.expand_as(places)))
        rows = {name: torch.stack(value, dim=1).flatten(0, 1) for name, value in rows.items()}  # (B·beginnings, …)
        logits, kept = self._read(rows, columns)
        logits = logits.unflatten(0, (len(ids), len(beginnings)))
        logits = logits.take_along_dim(kept[:, None, :, None], dim=2).float().log_softmax(-1)
        return {
            word: sum(logits[:, beginnings.index(word[:-1]), i, token] for i, token in enumerate(word))
            for words in self.words
            for word in words
        }

    def _read(self, rows: dict[str, torch.Tensor], columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of rows, of all columns or of those needed; and where `columns`, (B, N), are among them."""
        parameters = inspect.signature(type(self.lm).forward).parameters
        if "position_ids" in parameters:  # as `generate` counts them: padding on the left changes nothing
            rows["position_ids"] = (rows["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        if "logits_to_keep" not in parameters:
            return self.lm(**rows, **options).logits, columns
        needed, kept = columns.unique(return_inverse=True)
        return self.lm(**rows, **options, logits_to_keep=needed).logits, kept

    def _check_end(self, ids: torch.Tensor, last: torch.Tensor, mask: torch.Tensor) -> None:
        """Refuses texts that end in a mask or in the end of all text: a causal model expects something else there."""
        ends = {self.tokenizer.mask_token_id: "Leave {mask} out of the template."}
        ends[self.tokenizer.eos_token_id] = (
            "Encode texts without the token that says so, as with `tokenizer.add_eos_token = False`."
        )
        if torch.compiler.is_compiling():
            return
        for row, token_id in enumerate(ids.gather(1, last[:, None])[:, 0].tolist()):
            if token_id in ends and mask[row].sum() > 1:  # an empty text may be that token, with which texts begin
                raise ValueError(
                    f"Row {row} of `input_ids` ends in {self.tokenizer.convert_ids_to_tokens(token_id)!r}, and a "
                    f"causal model reads words behind the text. {ends[token_id]}"
                )


def check_settings(settings: object) -> dict[str, Any]:
    """Returns what a config keeps of a [`ClozeClassifier`] once it is checked.

    The words are a list of pairs, because files of configs have the names in a dict sorted, and the order counts.

    Raises:
        ValueError: There are less than two classes, a class without words, or no such calibration.
        TypeError: A value has the wrong type.
    """
    if not isinstance(settings, dict) or settings.keys() != {"label_words", "calibration", "word_prefix"}:
        raise ValueError(f"`cloze` has `label_words`, `calibration` and `word_prefix`, got {settings!r}.")
    pairs = settings["label_words"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"`label_words` of `cloze` must be a list of classes and their words, got {pairs!r}.")
    for label, words in pairs:
        if not isinstance(label, str) or not isinstance(words, list):
            raise TypeError(f"`label_words` must have a list of words for each class, got {label!r}: {words!r}.")
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"Class {label!r} of `label_words` must have words, none of them empty, got {words!r}.")
    if len(pairs) < 2 or len({label for label, _ in pairs}) < len(pairs):
        raise ValueError(f"`label_words` must have two different classes at least, got {pairs!r}.")
    if settings["calibration"] not in CALIBRATIONS:
        raise ValueError(f"`calibration` must be one of {CALIBRATIONS}, got {settings['calibration']!r}.")
    if not isinstance(settings["word_prefix"], str):
        raise TypeError(f"`word_prefix` must be a string, got {settings['word_prefix']!r}.")
    return settings


def _as_pairs(label_words: object) -> list[list]:
    if not isinstance(label_words, Mapping) or any(isinstance(words, str) for words in label_words.values()):
        raise TypeError(f"`label_words` must have a list of words for each class, got {label_words!r}.")
    return [[label, list(words)] for label, words in label_words.items()]


def _tokenize_words(
    tokenizer: PreTrainedTokenizerBase, label_words: Mapping[str, Sequence[str]], prefix: str
) -> list[list[tuple[int, ...]]]:
    """By class, the token ids of its words as they are behind a text."""
    found: list[list[tuple[int, ...]]] = []
    owners: dict[tuple[int, ...], str] = {}
    for label, words in label_words.items():
        found.append([])
        for word in words:
            ids = _ids_behind_text(tokenizer, prefix + word)
            if not ids or tokenizer.unk_token_id in ids:
                raise ValueError(
                    f"The word {word!r} of class {label!r} is unknown to this {type(tokenizer).__name__}."
                )
            if ids in owners:
                raise ValueError(
                    f"The word {word!r} of class {label!r} is, for the tokenizer, a word of class {owners[ids]!r} "
                    "already. Each word may stand for one class, once."
                )
            owners[ids] = label
            found[-1].append(ids)
    return found


def _ids_behind_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text that goes on another: some tokenizers put a space in front of the first word of a text."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a" + text, add_special_tokens=False)["input_ids"]
    if ids[: len(before)] != before:  # without a space between them, both may have become one token
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(ids[len(before) :])
