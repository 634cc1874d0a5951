"""Text encoders of video models: a Llama behind a template of prompts, and UMT5."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from family_models.text import WIDTH, WORDS, t5_tokenizer
from family_models.weights import seeded

HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")


def umt5_encoder(seed: int = 12) -> UMT5EncoderModel:
    """A T5 with relative positions in every layer: embeddings [rows, tokens, WIDTH]."""
    config = UMT5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return seeded(lambda: UMT5EncoderModel(config), seed)


PARTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text before it merges bytes."""


def llava_tokenizer(text: str, limit: int = 256) -> PreTrainedTokenizerFast:
    """Byte pairs as Llama 3 has them.

    Args:
        text: Its words are one token each, as are ``WORDS``; all others are spelled in bytes. A pipeline that cuts off
            its template at a published number of tokens then cuts it where the published tokenizer does.
        limit: Tokens of a prompt at most.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PARTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        show_progress=False,
        special_tokens=list(HEADERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text, *(f" {word}" for word in WORDS)], trainer)
    begin = HEADERS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token="<|end_of_text|>",
        pad_token="<|pad|>",
        model_max_length=limit,
        padding_side="right",
    )


def llava_encoder(tokenizer: PreTrainedTokenizerFast, *, layers: int = 4, seed: int = 13) -> LlamaModel:
    """Embeddings [rows, tokens, WIDTH] of every layer; pipelines read one before the last."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seeded(lambda: LlamaModel(config), seed)
