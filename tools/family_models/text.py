"""Tokenizers and text encoders: the published kinds over a vocabulary of a few hundred tokens."""

import json
import string
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaTokenizerFast,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from family_models.weights import seeded

WIDTH = 64
"""Channels of a text encoder."""
WORDS = ("a", "the", "of", "photo", "cat", "dog", "red", "blue", "on", "in", "house", "tree", "small", "old")
"""Words that are one token; all others are spelled in bytes or letters."""


Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]
"""Ids of tokens, and the merges of byte pairs."""


def byte_pairs(specials: tuple[str, ...], ending: str = "", words: tuple[str, ...] = WORDS) -> Vocabulary:
    """A vocabulary that spells any text in bytes, and the merges that join whole words.

    Args:
        specials: Tokens behind all others, as CLIP and Qwen have them.
        ending: What marks the last token of a word: CLIP's ``</w>``.
        words: What is one token, a space before a word as ``Ġ``.
    """
    letters = sorted(ByteLevel.alphabet())
    joined, merges = _joined(words, ending)
    tokens = [*letters, *(letter + ending for letter in letters if ending), *joined, *specials]
    return {token: index for index, token in enumerate(tokens)}, merges


def spelled(specials: tuple[str, ...], words: tuple[str, ...] = WORDS) -> Vocabulary:
    """A vocabulary of bytes, ASCII and words behind ``▁``, as SentencePiece makes them; specials come first."""
    joined, merges = _joined(tuple(f"▁{word}" for word in words))
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:95].strip(), *joined]
    return {token: index for index, token in enumerate(tokens)}, merges


def _joined(words: tuple[str, ...], ending: str = "") -> tuple[list[str], list[tuple[str, str]]]:
    """Join each word letter by letter."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + ending]
        merges.update({("".join(pieces[:end]), pieces[end]): None for end in range(1, len(pieces))})
    return ["".join(pair) for pair in merges], list(merges)


CLIP_VOCABULARY, CLIP_MERGES = byte_pairs(("<|startoftext|>", "<|endoftext|>"), "</w>")


def clip_tokenizer(pad: str = "<|endoftext|>", limit: int = 77) -> CLIPTokenizer:
    """CLIP's byte pairs. The second tokenizer of OpenCLIP pads by ``!``."""
    return CLIPTokenizer(dict(CLIP_VOCABULARY), list(CLIP_MERGES), pad_token=pad, model_max_length=limit)


def clip_config(*, act: str = "quick_gelu", layers: int = 2, limit: int = 77, width: int = WIDTH) -> CLIPTextConfig:
    """A CLIP text encoder's: OpenAI's activation is ``quick_gelu``, OpenCLIP's ``gelu``.

    The ids of special tokens are those of the published configs, which are not the tokenizer's; with
    ``eos_token_id=2`` the encoder pools at the largest id, which is the end of the text.
    """
    return CLIPTextConfig(
        vocab_size=len(CLIP_VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=limit,
        hidden_act=act,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def clip_encoder(seed: int = 10, *, act: str = "quick_gelu", layers: int = 2, width: int = WIDTH) -> CLIPTextModel:
    """Embeddings [rows, 77, width]."""
    return seeded(lambda: CLIPTextModel(clip_config(act=act, layers=layers, width=width)), seed)


def clip_projected(
    seed: int = 11, *, act: str = "gelu", layers: int = 3, limit: int = 77, width: int = WIDTH
) -> CLIPTextModelWithProjection:
    """Embeddings [rows, limit, width] and one pooled embedding [rows, width]."""
    config = clip_config(act=act, layers=layers, limit=limit, width=width)
    return seeded(lambda: CLIPTextModelWithProjection(config), seed)


SENTINELS = tuple(f"<extra_id_{index}>" for index in reversed(range(100)))


def t5_tokenizer(limit: int = 512) -> T5TokenizerFast:
    """T5's Unigram over the words and the letters of ASCII."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS if len(word) > 1]
    pieces += [(letter, -6.0) for letter in string.printable[:94]]
    pieces += [(token, 0.0) for token in SENTINELS]
    return T5TokenizerFast(vocab=pieces, model_max_length=limit)


def t5_encoder(seed: int = 12, *, layers: int = 2, width: int = WIDTH) -> T5EncoderModel:
    """The encoder of T5 v1.1 (gated GELU): embeddings [rows, tokens, width]."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu_new",
        is_gated_act=True,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return seeded(lambda: T5EncoderModel(config), seed)


def umt5_encoder(seed: int = 16) -> UMT5EncoderModel:
    """T5 whose layers have positions of their own: embeddings [rows, tokens, WIDTH]."""
    config = UMT5Config(
        vocab_size=len(spelled(LLAMA_SPECIALS)[0]), d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=2, num_heads=4
    )
    return seeded(lambda: UMT5EncoderModel(config), seed)


LLAMA_SPECIALS = ("<unk>", "<s>", "</s>")


def llama_tokenizer() -> LlamaTokenizerFast:
    """Llama's byte pairs with bytes for what it cannot spell, as AuraFlow has them before UMT5."""
    vocabulary, merges = spelled(LLAMA_SPECIALS)
    return LlamaTokenizerFast(
        vocab=vocabulary, merges=merges, pad_token="<s>", padding_side="right", model_max_length=512
    )


BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_LETTERS = sorted(set(string.printable[:94].lower()))
BERT_VOCABULARY = (*BERT_SPECIALS, *BERT_LETTERS, *(f"##{letter}" for letter in BERT_LETTERS), *WORDS[1:])


def bert_tokenizer() -> BertTokenizer:
    """BERT's word pieces, 77 tokens at most."""
    return BertTokenizer({token: index for index, token in enumerate(BERT_VOCABULARY)}, model_max_length=77)


def bert_encoder(seed: int = 17) -> BertModel:
    """Embeddings [rows, 77, WIDTH]."""
    config = BertConfig(
        vocab_size=len(BERT_VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
    )
    return seeded(lambda: BertModel(config), seed)


def write_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the vocabulary beside ``tokenizer.json`` in the older form, which the published folders of these have."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if isinstance(tokenizer, CLIPTokenizer | Qwen2Tokenizer):
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
        merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        (folder / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    if isinstance(tokenizer, BertTokenizer):
        (folder / "vocab.txt").write_text("\n".join(sorted(model["vocab"], key=model["vocab"].get)) + "\n", "utf-8")
