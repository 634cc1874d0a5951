"""How to build a bundle's engines with TensorRT where this project is not: a shell script around ``trtexec``."""

from pathlib import Path

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.runtime.engines.tensorrt.building.profile import Profile, step_profiles
from tfmq_export.runtime.engines.tensorrt.tensors import ShapeRange
from tfmq_export.runtime.measure.operations import read_graph

SCRIPT = "tfmq/build_tensorrt.sh"
"""Its place in a bundle."""

_HEAD = """\
#!/bin/sh
# Builds this bundle's engines with TensorRT 10 or 11, on a machine with the GPU that will run them.
# Where tfmq-export is installed there, this does it, proves what runs in int8 and lists the engines in the manifest:
#
#     tfmq-build . --tensorrt
#
# Without it, run this script.
set -eu
cd "$(dirname "$0")/.."
# TensorRT 11 knows no other networks and may not know the flag.
typed=$(trtexec --help 2>&1 | grep -q -e --stronglyTyped && echo --stronglyTyped || true)
"""


def write_build_script(bundle: Bundle) -> Bundle:
    """Write ``tfmq/build_tensorrt.sh`` and list it in the manifest."""
    path = bundle.root / SCRIPT
    path.write_text(build_script(bundle), "utf-8")
    path.chmod(0o755)
    return bundle.extended([SCRIPT])


def build_script(bundle: Bundle) -> str:
    """The script."""
    return "\n".join([_HEAD, *build_commands(bundle)])


def build_commands(bundle: Bundle) -> list[str]:
    """A ``trtexec`` command for each graph, to run in the bundle's folder; ``$typed`` is ``--stronglyTyped`` before
    TensorRT 11."""
    jobs = [(bundle.model, step_profiles(bundle.manifest)[0])]
    if bundle.prologue is not None:
        jobs.append((bundle.prologue, Profile()))
    return [_command(bundle, graph, profile) for graph, profile in jobs]


def _command(bundle: Bundle, graph: Path, profile: Profile) -> str:
    folder = graph.parent.relative_to(bundle.root).as_posix()
    words = [
        f"trtexec --onnx={folder}/{graph.name} --saveEngine={folder}/engines/{folder}.engine $typed",
        "--skipInference --profilingVerbosity=detailed",
    ]
    shapes = _varying(graph, profile)
    if shapes:
        for option, end in (("minShapes", "smallest"), ("optShapes", "usual"), ("maxShapes", "largest")):
            named = ",".join(f"'{name}':{'x'.join(map(str, getattr(each, end)))}" for name, each in shapes.items())
            words.append(f"--{option}={named}")
    return f"mkdir -p {folder}/engines\n" + " \\\n  ".join(words) + "\n"


def _varying(graph: Path, profile: Profile) -> dict[str, ShapeRange]:
    """Shapes of the inputs that may vary."""
    found = {}
    for value in read_graph(graph).input:
        sizes = [axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim]
        if None in sizes:
            rest = tuple(size or 1 for size in sizes[1:])
            found[value.name] = profile.shapes.get(value.name) or ShapeRange(
                *((batch, *rest) for batch in profile.batch)
            )
    return found
