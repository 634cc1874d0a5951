"""What a manifest says of its bundle, against the recipe that lies in it.

Runtimes, gates and reports read the manifest alone: which preset it is, which layers should run in integers. A manifest
that says less than the recipe decided would have the receipt ask for less.
"""

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import LoadError
from tfmq_export.recipe.recipe import QuantRecipe


def require_manifest_of(bundle: Bundle, recipe: QuantRecipe) -> None:
    """Refuse a manifest that is not one of this recipe.

    Raises:
        LoadError: names what differs, and both values.
    """
    manifest = bundle.manifest
    asked = {x.name: (x.weight_bits, x.activation_bits) for x in manifest.layers if x.activation_bits}
    decided = {x.name: (x.weight.spec.bits, x.input.spec.bits) for x in recipe.layers}
    decided |= {x.name: (0, x.left.spec.bits) for x in recipe.products}
    differing = sorted(name for name in asked.keys() | decided.keys() if asked.get(name) != decided.get(name))
    said: dict[str, tuple[object, object]] = {
        "model": (manifest.fingerprint[:12], recipe.fingerprint[:12]),
        "preset": (manifest.preset, recipe.preset),
        "timesteps": (manifest.timesteps.describe(), recipe.tib.timesteps.describe()),
        "multiply-accumulates": (manifest.macs, recipe.macs),
    }
    said |= {f"bits of {name}": (asked.get(name, "float"), decided.get(name, "float")) for name in differing[:1]}
    wrong = [f"{what} {stated}, its recipe {true}" for what, (stated, true) in said.items() if stated != true]
    if manifest.timesteps != recipe.tib.timesteps and not wrong:
        wrong = ["other timesteps than its recipe"]
    if wrong:
        raise LoadError(f"{bundle.root}: the manifest says {wrong[0]}; compile the model again")
