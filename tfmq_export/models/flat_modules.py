"""diffusers models as flat functions of tensors: what ``torch.export`` captures.

Arguments keep the names of the model's own ``forward``, so that a compiled graph can stand in for it by name.
"""

from torch import Tensor, nn


class Unconditional(nn.Module):
    """A U-Net of sample and timestep."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.model(sample, timestep, return_dict=False)[0]


class ClassConditional(nn.Module):
    """A U-Net that takes a class label."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.model(sample, timestep, class_labels, return_dict=False)[0]


class CrossAttention(nn.Module):
    """A U-Net that attends to a prompt."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class LabelledAttention(nn.Module):
    """A U-Net that attends to a prompt and takes a class label, such as the level of noise of an upscaler."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, class_labels: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, class_labels, return_dict=False)[0]


class ClassTransformer(nn.Module):
    """A DiT, which takes a class label."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.model(hidden_states, timestep, class_labels, return_dict=False)[0]


class PromptTransformer(nn.Module):
    """A transformer that attends to a prompt, and takes a pooled one beside it (SD3)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        return self.model(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]
