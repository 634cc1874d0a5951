"""The pieces of the mutation table: what a fault alters, that the bundle is signed again, and who is named."""

from pathlib import Path

import faults
import numpy as np
import onnx
import pytest
from fault_kinds.fault import Fault, sign
from fault_kinds.files import cut, flip
from fault_kinds.graph import at, edited, one_code, swapped_nibbles
from standins.small_bundle import small_bundle

from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.errors import LoadError


def halved(root: Path) -> None:
    with edited(root) as graph:
        (node,) = [node for node in graph.all_of("Mul") if node.input[0] == "sample"]
        graph.own(node, 1, graph.get(node.input[1]) / 2)


def test_thirty_faults_and_more_have_names_of_their_own() -> None:
    names = [fault.name for fault in faults.FAULTS]

    assert len(names) == len(set(names)) >= 30


def test_an_edited_graph_has_a_constant_of_its_own_for_the_one_node(tmp_path: Path) -> None:
    root = small_bundle(tmp_path / "out").root

    halved(root)

    stored = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(root / "unet/model.onnx").graph.initializer}
    assert stored["half"] == 0.5
    assert stored["half.fault"] == 0.25


def test_a_signed_bundle_is_one_of_a_faulty_compiler(tmp_path: Path) -> None:
    root = small_bundle(tmp_path / "out").root

    halved(root)
    with pytest.raises(LoadError, match="differs from the manifest's hash"):
        open_bundle(root).verify()
    sign(root)

    open_bundle(root).verify()


@pytest.mark.parametrize("damage", [flip, lambda root: cut("graph", root)], ids=["flip", "cut"])
def test_damage_is_found_by_the_hash(damage: object, tmp_path: Path) -> None:
    root = small_bundle(tmp_path / "out").root

    Fault("damage", damage).inject(root)  # type: ignore[arg-type]

    with pytest.raises(LoadError, match=r"model\.onnx"):
        open_bundle(root).verify()


def test_codes_move_by_one_step_and_stay_on_their_grid() -> None:
    codes = np.asarray([[[7, 1]], [[-8, 0]]], np.int8)

    assert one_code(codes.copy())[0, 0, 0] == 6
    assert one_code(codes[1:].copy())[0, 0, 0] == -7
    assert swapped_nibbles(codes).tolist() == [[[1, 7]], [[0, -8]]]
    assert at(0, lambda row: row + 1, codes.copy())[0].tolist() == [[8, 2]]


def test_a_fault_that_nobody_notices_stands_out_in_the_table() -> None:
    rows = [
        faults.Row("scale", (("self-test", "/tmp/x/broken: 3 dB | far"), ("receipt", "b"), ("receipt", "c"))),
        faults.Row("bias", ()),
    ]

    text = faults.as_table(rows)

    assert "| scale | self-test, receipt | 3 dB \\| far |" in text
    assert "| bias | **nothing** |" in text
