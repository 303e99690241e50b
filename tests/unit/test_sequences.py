"""A text's tokens, and sequences cut from them: nothing lost or twice, BOS in front where the text begins with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from quantcache.common.sequences import cut_windows, split_text, text_tokens, without_padding

BOS = 2
WITH_BOS = LlamaConfig(bos_token_id=BOS)


def text_of(count: int) -> torch.Tensor:
    """BOS, and tokens that are all different."""
    return torch.cat((torch.tensor([BOS]), torch.arange(10, 9 + count)))


@given(st.integers(1, 60), st.integers(2, 12))
def test_every_token_is_in_one_sequence(count: int, length: int) -> None:
    text = text_of(count)
    parts = split_text(WITH_BOS, text, length)
    assert all(part.shape[1] <= length and part[0, 0] == BOS for part in parts)
    assert [token for part in parts for token in part[0, 1:].tolist()] == text[1:].tolist()


@given(st.integers(12, 60), st.integers(2, 12))
def test_windows_are_full_and_follow_each_other(count: int, length: int) -> None:
    text = text_of(count)
    windows = cut_windows(WITH_BOS, text, length)
    assert windows.shape == ((count - 1) // (length - 1), length)
    assert windows[:, 0].tolist() == [BOS] * len(windows)
    assert windows[:, 1:].flatten().tolist() == text[1 : windows[:, 1:].numel() + 1].tolist()


def test_padding_is_cut_off() -> None:
    """Inside a text it stays, and beside it one EOS token, which may be the padding token too."""
    rows = [[9, 9, 9, 1, 2], [1, 2, 8, 9, 9], [9, 1, 9, 9, 2], [9, 9, 9, 9, 9], [8, 1, 2, 3, 8]]
    found = without_padding(torch.tensor(rows), {9}, {8})
    assert [row.tolist() for row in found] == [[[1, 2]], [[1, 2, 8]], [[1, 9, 9, 2]], [[8, 1, 2, 3, 8]]]
    found = without_padding(torch.tensor(rows), {9}, {8, 9})
    assert [row.tolist() for row in found] == [[[9, 1, 2]], [[1, 2, 8]], [[9, 1, 9, 9, 2]], [[8, 1, 2, 3, 8]]]
    plain = torch.tensor(rows[4:] * 2)
    assert without_padding(plain, {9}, {8})[0] is plain
    assert without_padding(plain, set(), set())[0] is plain


def test_sliding_windows_keep_bos_too() -> None:
    assert cut_windows(WITH_BOS, text_of(9), 10).shape == (0, 10)
    windows = cut_windows(WITH_BOS, text_of(9), 5, stride=2)
    assert windows.tolist() == [[BOS, 10, 11, 12, 13], [BOS, 12, 13, 14, 15], [BOS, 14, 15, 16, 17]]


def test_texts_that_do_not_begin_with_bos_are_cut_as_they_are() -> None:
    for config in (LlamaConfig(bos_token_id=None), LlamaConfig(bos_token_id=7)):
        assert cut_windows(config, text_of(8), 4).tolist() == [[BOS, 10, 11, 12], [13, 14, 15, 16]]
        assert [part.tolist() for part in split_text(config, text_of(6), 4)] == [[[BOS, 10, 11, 12]], [[13, 14]]]


def test_models_of_several_parts_say_it_in_their_text_configuration() -> None:
    config: PreTrainedConfig = Gemma3Config(text_config={"bos_token_id": BOS})
    assert cut_windows(config, text_of(7), 4)[:, 0].tolist() == [BOS, BOS]


@pytest.fixture(scope="module")
def marking() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a BOS token, and with a token of its own for unknown words and for a chat's turns."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<bos>", "<unk>", "<turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["a film, a play"], trainer)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", unk_token="<unk>", additional_special_tokens=["<turn>"]
    )


def test_a_mark_for_unknown_words_is_text(marking: PreTrainedTokenizerFast) -> None:
    text = "a film <unk> and a play <unk>"
    assert 1 in marking(text).input_ids, "the tokenizer itself takes it for a token of its own"
    for leading in (True, False):
        found = text_tokens(marking, text, add_special_tokens=leading).tolist()
        assert 1 not in found
        assert found[:1] == [0] if leading else 0 not in found
        assert marking.decode(found[leading:]) == text


def test_marks_of_a_chat_are_tokens(marking: PreTrainedTokenizerFast) -> None:
    text = "<turn>a film<turn>a play <unk>"
    assert text_tokens(marking, text).tolist() == marking(text).input_ids
    assert text_tokens(marking, text).tolist().count(2) == 2


@pytest.mark.parametrize("text", ["a film, a play", "", "unk"])
def test_other_texts_are_as_the_tokenizer_gives_them(marking: PreTrainedTokenizerFast, text: str) -> None:
    assert text_tokens(marking, text).tolist() == marking(text).input_ids


@pytest.mark.parametrize("mark", ["", "<unk> "])
def test_only_as_much_text_is_tokenized_as_is_wanted(marking: PreTrainedTokenizerFast, mark: str) -> None:
    text = mark + "a film, a play " * 400
    whole = text_tokens(marking, text).tolist()
    for count in (0, 1, 7, 300, len(whole), len(whole) + 9):
        assert text_tokens(marking, text, count).tolist() == whole[:count]
