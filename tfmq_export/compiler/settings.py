"""Check the settings against what the target can do, before any long work."""

from pathlib import Path

from tfmq_export.config import CompileConfig, Method, find_preset
from tfmq_export.errors import ConfigError, TargetError
from tfmq_export.ptq.walk.effort import NARROW_BITS
from tfmq_export.recipe.adapt import check_products, check_tables
from tfmq_export.recipe.grid import WIDE
from tfmq_export.recipe.io import load_recipe
from tfmq_export.recipe.pairs import PAIR_SUM
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import Target


def check_settings(config: CompileConfig, target: Target) -> None:
    """Refuse before an hour of quantizing what would be refused after it.

    Raises:
        TargetError: the target cannot run what is asked for.
    """
    quantizes = find_preset(config.preset).weight_bits > 0
    if config.method.attention == "integer":
        if not quantizes:
            raise TargetError(f"preset {config.preset} keeps attention in floating point; use --preset w8a8")
        check_products(target)
    if quantizes and not target.integers and not config.allow_precision_loss:
        raise TargetError(
            f"{target.name} has no integer kernels for QDQ graphs and runs every layer in floating point; "
            "add --allow-precision-loss, or use --target tensorrt-rtx or --preset fp32"
        )
    if quantizes and config.method.fsc == "all" and "conv" in target.quantized_outputs:
        raise TargetError(
            f"{target.name} has no lowering for a grid per timestep under a quantized output; "
            'set fsc = "tib" in [method], or use --target openvino'
        )
    check_tables(config.tables, target)
    check_wide(config, target)
    if target.integers_only:
        check_integers_only(config, target)
    check_pins(config, target)
    check_goal(config, target)


def check_wide(config: CompileConfig, target: Target) -> None:
    """Raise TargetError for 16-bit activations on a target that has no kernels for them."""
    asked = [find_preset(config.preset).activation_bits, *(pin.inputs for pin in config.layers.values())]
    if WIDE in asked and not target.wide_codes:
        raise TargetError(f"{target.name} has no kernels for 16-bit activations; use 8 bits, or --target qnn")


def check_integers_only(config: CompileConfig, target: Target) -> None:
    """Raise TargetError for what would compute in floating point where nothing may."""
    why = f"{target.name} computes in integers alone"
    if not find_preset(config.preset).weight_bits:
        raise TargetError(f"preset {config.preset}: {why}; use --preset w8a16")
    if config.method.attention == "float":
        raise TargetError(f"--attention float: {why}; leave it out")
    if any("float" in (pin.weights, pin.inputs) for pin in config.layers.values()):
        raise TargetError(f"[layers] with float: {why}; pin inputs = 16 instead")
    if config.prologue:
        raise TargetError(f"--prologue: {target.name} has one graph so far; leave it out")
    if config.auto:
        raise TargetError(f"--auto does not measure {target.name}; use --preset w8a8, w8a16, w4a8 or w4a16")


def check_goal(config: CompileConfig, target: Target) -> None:
    """Refuse a goal without ``--auto``, and ``--auto`` without a goal or beside what it decides.

    Raises:
        ConfigError: says which.
        TargetError: the target has no integers to choose from.
    """
    if not config.auto:
        for flag, value in (("--max-size", config.max_size), ("--max-latency", config.max_latency)):
            if value is not None:
                raise ConfigError(f"{flag} is a goal of --auto; add that, or leave it out")
        return
    if config.max_size is None and config.max_latency is None and config.thresholds.psnr is None:
        raise ConfigError("--auto needs a goal: --min-psnr, --max-size, --max-latency, or several of them")
    if "preset" in config.model_fields_set:
        raise ConfigError(f"--auto chooses the bits of each layer; leave --preset {config.preset} out")
    if not target.integers:
        raise TargetError(f"{target.name} has no integer kernels, so --auto has nothing to choose; use --preset fp32")
    if config.max_latency is not None and not target.stored_weights:
        raise TargetError(
            f"{target.name} has no layers in floating point from stored weights, which are all that --max-latency "
            "chooses between; leave it out, or use --target ort-cpu or openvino"
        )


def check_pins(config: CompileConfig, target: Target) -> None:
    """Raise TargetError for layers pinned to what the preset or the target cannot do."""
    if not config.layers:
        return
    if not find_preset(config.preset).weight_bits:
        raise TargetError(f"preset {config.preset} quantizes no layer that [layers] could pin; use --preset w8a8")
    for pattern, pin in config.layers.items():
        if pin.inputs == "float" and pin.weights != "float" and not target.stored_weights:
            raise TargetError(
                f'[layers."{pattern}"] inputs = "float": {target.name} computes in integers wherever weights are '
                'stored as integers; set weights = "float" too, or use --target ort-cpu'
            )


def narrowest(config: CompileConfig) -> int:
    """Bits of the narrowest weights that are asked for anywhere: they decide how long rounding is learned."""
    if config.auto:
        return NARROW_BITS  # most layers will have so many
    pinned = [pin.weights for pin in config.layers.values() if isinstance(pin.weights, int)]
    return min([find_preset(config.preset).weight_bits, *pinned])


def settle(method: Method, target: Target) -> Method:
    """The method with what it leaves to the target decided."""
    chosen: dict[str, str] = {}
    if method.attention == "auto":
        chosen["attention"] = "integer" if target.integer_attention else "float"
    if not target.saturates:
        chosen["cpus"] = "vnni"  # nothing there saturates: no reason to spare the weights
    return method.model_copy(update=chosen) if chosen else method


def check_pairs(recipe: QuantRecipe, target: Target, method: Method) -> None:
    """Refuse weights that some of a target's hosts would compute wrongly (``pairs.py``), unless that was asked for.

    Raises:
        TargetError: neighbouring weights saturate on CPUs without VNNI.
    """
    if not target.saturates or "vnni" in (method.cpus, recipe.provenance.get("cpus")):
        return
    sums = {layer.path: layer.largest_pair for layer in recipe.layers}
    sums |= {product.path: 2 * -product.right.spec.qmin for product in recipe.products}
    broken = [path for path, found in sums.items() if found > PAIR_SUM]
    if broken:
        worst = max(broken, key=sums.__getitem__)
        raise TargetError(
            f"{len(broken)} of {len(sums)} layers hold weights that saturate on CPUs without VNNI (in {worst} two "
            f"neighbours add up to {sums[worst]}, {PAIR_SUM} is safe); quantize again without --recipe for "
            f"{target.name} on any CPU, or take the recipe as it is with --cpus vnni"
        )


def recipe_as_asked(path: Path, config: CompileConfig) -> QuantRecipe:
    """Read a recipe, and refuse what was asked for by name and is otherwise in it: it is quantized already.

    Raises:
        RecipeError: it cannot be read.
        ConfigError: a setting that was given is not the recipe's.
    """
    recipe = load_recipe(path)
    if config.auto:
        raise ConfigError("--auto: the recipe has every layer's bits; leave it out, or quantize without --recipe")
    if config.layers:
        raise ConfigError("[layers]: the recipe has every layer's bits; leave it out, or quantize without --recipe")
    asked = config.model_dump(include={"preset", "effort"}, exclude_unset=True)
    asked |= config.method.model_dump(exclude_unset=True)
    if asked.get("cpus") == "vnni":  # which takes any weights
        del asked["cpus"]
    made = {**recipe.provenance, "preset": recipe.preset}
    for name, value in asked.items():
        if value != "auto" and str(value) != made.get(name, str(value)):
            raise ConfigError(
                f"{name} {value}: the recipe was made with {made[name]}; leave it out, or quantize without --recipe"
            )
    return recipe
