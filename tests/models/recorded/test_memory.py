"""An encoder is asked once for each prompt."""

import torch
from torch import Tensor, nn

from tfmq_export.models.recorded.memory import Remembered


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        self.asked += 1
        return {"state": ids.float() * scale * (1 if mask is None else mask)}


def test_the_same_question_is_asked_once_and_its_answer_may_be_written_to() -> None:
    encoder = Encoder()
    encoder.__dict__["forward"] = Remembered(encoder)
    for _ in range(2):
        encoder(torch.tensor([1, 2]))["state"].zero_()

    assert torch.equal(encoder(torch.tensor([1, 2]))["state"], torch.tensor([1.0, 2.0]))
    assert encoder.asked == 1
    for other in (
        {"ids": torch.tensor([1, 3])},
        {"ids": torch.tensor([1, 2]), "scale": 2.0},
        {"ids": torch.tensor([1, 2]), "mask": torch.tensor([1, 0])},
        {"ids": torch.tensor([[1, 2]])},
    ):
        encoder(**other)
    assert encoder.asked == 5


class State:
    """Counts for itself, as the cache of a language model does."""

    def __init__(self) -> None:
        self.length = 0

    def __repr__(self) -> str:
        return "State()"


class Continues(nn.Module):
    def forward(self, ids: Tensor, state: State) -> Tensor:
        state.length += len(ids)
        return ids + state.length


def test_what_goes_on_from_a_state_is_asked_each_time() -> None:
    net, state = Continues(), State()
    net.__dict__["forward"] = Remembered(net)
    found = [net(torch.tensor([0]), state).item() for _ in range(3)]
    assert found == [1, 2, 3]


def test_questions_that_only_look_alike_are_told_apart() -> None:
    class Sum(nn.Module):
        def forward(self, a: int, b: int) -> Tensor:
            return torch.tensor(10 * a + b)

    net = Sum()
    net.__dict__["forward"] = Remembered(net)
    assert [net(a=1, b=11).item(), net(a=11, b=1).item()] == [21, 111]


def test_old_answers_make_room() -> None:
    encoder = Encoder()
    encoder.__dict__["forward"] = Remembered(encoder, most=16)
    for ids in (1, 2, 3, 2, 1):  # two answers of eight bytes fit
        encoder(torch.tensor([ids, ids]))
    assert encoder.asked == 4
