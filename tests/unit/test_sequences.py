"""Sequences cut from a text: nothing lost, nothing twice, and BOS in front of each where the text begins with it."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3Config, LlamaConfig, PreTrainedConfig

from quantcache.common.sequences import cut_windows, split_text

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


def test_sliding_windows_keep_bos_too() -> None:
    windows = cut_windows(WITH_BOS, text_of(9), 5, stride=2)
    assert windows.tolist() == [[BOS, 10, 11, 12, 13], [BOS, 12, 13, 14, 15], [BOS, 14, 15, 16, 17]]


def test_texts_that_do_not_begin_with_bos_are_cut_as_they_are() -> None:
    for config in (LlamaConfig(bos_token_id=None), LlamaConfig(bos_token_id=7)):
        assert cut_windows(config, text_of(8), 4).tolist() == [[BOS, 10, 11, 12], [13, 14, 15, 16]]
        assert [part.tolist() for part in split_text(config, text_of(6), 4)] == [[[BOS, 10, 11, 12]], [[13, 14]]]


def test_models_of_several_parts_say_it_in_their_text_configuration() -> None:
    config: PreTrainedConfig = Gemma3Config(text_config={"bos_token_id": BOS})
    assert cut_windows(config, text_of(7), 4)[:, 0].tolist() == [BOS, BOS]
