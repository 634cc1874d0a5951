"""Attention's products: found in the captured graph, spelled out, and left alone with a reason."""

from collections.abc import Callable

import pytest
import torch
from nets.handwritten import captured, probe
from torch import Tensor, nn
from torch.nn import functional

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.capture.rewrites.spell_attention import OFF, float_products, integer_products, spell_attention

TOKENS, HEADS, SIZE = 16, 2, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attends(nn.Module):
    """Tokens of 2 x 2 patches through one attention."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.patchify, self.back = nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(8, 3, 2, stride=2)
        self.qkv = nn.Linear(8, 24)
        self.attend = attend

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.patchify(sample).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.attend(q, k, v).transpose(1, 2).reshape(-1, TOKENS, 8)
        return self.back((x + y).transpose(1, 2).reshape(-1, 8, 4, 4)) + timestep[:, None, None, None].float().cos()


def one_node(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def with_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=0.7)


def with_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, torch.linspace(-3, 3, TOKENS).expand(TOKENS, TOKENS))


def with_bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, torch.ones(TOKENS, TOKENS).tril().bool())


def with_unseeing_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, torch.ones(TOKENS, TOKENS).tril(-1).bool())


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.dropout((q @ k.transpose(-2, -1) / SIZE**0.5 + 0.1).softmax(-1), 0.1, training=False) @ v


def folded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, TOKENS, SIZE) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).reshape(-1, HEADS, TOKENS, SIZE)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v)


def softmax_second(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (k @ q.transpose(-2, -1)).softmax(-2)
    return (v.transpose(-2, -1) @ weights).transpose(-2, -1)


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


def program_of(attend: Attend) -> tuple[Denoiser, DiffusionProgram]:
    torch.manual_seed(0)
    denoiser = probe(Attends(attend))
    return denoiser, capture(denoiser)


def predict(denoiser: Denoiser, program: DiffusionProgram) -> Tensor:
    with torch.no_grad():
        result = program.module(**denoiser.example_inputs)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    "attend",
    [one_node, with_scale, with_float_mask, with_bool_mask, with_unseeing_queries, spelled_out, folded_heads],
    ids=lambda x: x.__name__,
)
def test_attention_is_found_and_spelling_it_out_changes_no_prediction(attend: Attend) -> None:
    denoiser, program = program_of(attend)
    before = predict(denoiser, program)

    spelled = spell_attention(program)

    kinds = [product.path.rpartition("[")[2] for product in integer_products(program)]
    assert kinds == ["qk]", "pv]"]
    assert [product.of_softmax for product in program.attention] == [False, True]
    assert [product.macs for product in program.attention] == [HEADS * TOKENS * TOKENS * SIZE] * 2
    names = {node.name for node in spelled.module.graph.nodes}
    assert {product.name for product in program.attention} <= names
    assert not [node for node in spelled.module.graph.nodes if "scaled_dot" in str(node.target)]
    torch.testing.assert_close(predict(denoiser, spelled), before)
    torch.testing.assert_close(predict(denoiser, program), before)  # the program itself is as it was


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (causal, "is_causal is not lowered to integers"),
        (einsum, "it is written as einsum; write it as torch.matmul"),
        (softmax_second, "its softmax is the second factor; write p @ v"),
        (over_heads, "its softmax is not over the keys"),
        (over_queries, "its softmax is not over the keys"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_run_in_integers_stays_whole_and_says_why(attend: Attend, reason: str) -> None:
    _, program = program_of(attend)

    assert len(program.attention) == 2
    assert integer_products(program) == ()
    assert [layer.reason for layer in float_products(program)] == [reason] * 2
    spelled = spell_attention(program)
    assert [node.name for node in spelled.module.graph.nodes] == [node.name for node in program.module.graph.nodes]


def test_products_without_a_softmax_of_scores_are_no_attention() -> None:
    assert program_of(no_attention)[1].attention == ()


def test_both_spellings_of_one_model_are_found() -> None:
    _, program = captured("dit")

    products = integer_products(program)

    assert [product.path.rpartition("[")[2] for product in products] == ["qk]", "pv]"] * 2
    assert len({product.source for product in products}) == 3  # one node, then two
    layers = sum(op.macs for op in program.operations) + sum(op.macs for op, _ in program.left_float)
    assert layers + sum(product.macs for product in products) == program.macs


def test_a_reason_for_all_does_not_hide_an_obstacle() -> None:
    _, program = program_of(causal)
    _, plain = program_of(one_node)

    assert {layer.reason for layer in float_products(program, OFF)} == {"is_causal is not lowered to integers"}
    assert {layer.reason for layer in float_products(plain, OFF)} == {OFF}
    assert float_products(plain) == ()


def test_spelling_out_twice_is_spelling_out_once() -> None:
    _, program = captured("dit")
    once = spell_attention(program)

    again = spell_attention(once)

    assert str(again.module.graph) == str(once.module.graph)
