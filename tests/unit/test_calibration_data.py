"""What a calibration is made of where several texts are given: something of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quantcache.calibration.data import CalibrationData, calibration_data
from quantcache.common.sequences import split_text, text_tokens
from tests.families import FAMILIES, shared_model

LENGTH = 40
BOS, BLANK = "<s>", "|"
WORDS = [f"{letter}{number}" for letter in "abc" for number in range(400)]
VOCABULARY = {word: place for place, word in enumerate([BOS, BLANK, *WORDS])}  # the models' BOS token is 0


def words_and_blanks(begin: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each word, and for whatever lies between two texts."""
    whole = Tokenizer(models.WordLevel(VOCABULARY, unk_token=BLANK))
    whole.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if begin:
        whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=whole)


TOKENIZERS = {begin: words_and_blanks(begin) for begin in ("", BOS)}
each_tokenizer = pytest.mark.parametrize("begin", TOKENIZERS)


def words(letter: str, count: int, first: int = 0) -> list[str]:
    return [f"{letter}{number}" for number in range(first, first + count)]


def data(begin: str, *texts: list[str], max_tokens: int = 4 * LENGTH) -> CalibrationData:
    given = [" ".join(text) for text in texts]
    return calibration_data(shared_model(FAMILIES[0]), given, TOKENIZERS[begin], LENGTH, max_tokens)


def shown(begin: str, sequences: list[torch.Tensor]) -> list[list[str]]:
    """Words of each sequence, behind the token that it must begin with."""
    found = [TOKENIZERS[begin].convert_ids_to_tokens(each[0].tolist()) for each in sequences]
    assert all(each[: len(begin) // 3] == [begin][: len(begin) // 3] for each in found)
    return [each[len(begin) // 3 :] for each in found]


@each_tokenizer
def test_long_texts_take_turns(begin: str) -> None:
    """Whatever stood behind the first 32,768 tokens was left out, a second file, say; and nothing said so."""
    found = data(begin, words("a", 400), words("b", 400), words("c", 50))
    step = LENGTH - (begin != "")
    turns = [words("a", step), words("b", step), words("c", step), words("a", step, step)]
    assert shown(begin, found.sequences) == turns
    behind = [word for each in shown(begin, found.held_out) for word in each]
    assert behind[:step] == words("b", step, step)


@each_tokenizer
def test_short_texts_stand_side_by_side(begin: str) -> None:
    step = LENGTH - (begin != "")
    found = data(begin, words("a", 25), words("b", 400), words("c", 30), max_tokens=3 * LENGTH)
    beside = [*words("a", 25), BLANK, *words("c", step - 26)]
    assert shown(begin, found.sequences) == [words("b", step), beside, words("b", step, step)]


@each_tokenizer
def test_one_text_is_read_as_it_stands(begin: str) -> None:
    model, text = shared_model(FAMILIES[0]), " ".join(words("a", 150))
    found = data(begin, words("a", 150), max_tokens=400)
    expected = split_text(model.config, text_tokens(TOKENIZERS[begin], text), LENGTH)
    assert all(map(torch.equal, [*found.sequences, *found.held_out], expected))


@pytest.mark.parametrize("max_tokens", [160, 2000])
@given(st.lists(st.integers(17, 133), min_size=1, max_size=3))
def test_nothing_is_read_twice_or_out_of_order(max_tokens: int, counts: list[int]) -> None:
    texts = [words(letter, count) for letter, count in zip("abc", counts, strict=False)]
    found = data(BOS, *texts, max_tokens=max_tokens)
    assert found.num_tokens <= max_tokens
    read = [word for each in shown(BOS, found.sequences) for word in each if word != BLANK]
    for letter, text in zip("abc", texts, strict=False):
        own = [word for word in read if word.startswith(letter)]
        assert own == text[: len(own)]
        if max_tokens == 2000:
            assert len(text) - len(own) <= 17 + 2, "an end that is too short for a sequence"


def test_texts_for_which_no_tokens_are_left() -> None:
    """Its cost is measured on 4,096 tokens more than a calibration is made of."""
    texts = [words("a", 400)] * 120
    with pytest.warns(UserWarning, match="^7 of 120 texts are left out: those before have tokens enough$"):
        data("", *texts, max_tokens=400)
