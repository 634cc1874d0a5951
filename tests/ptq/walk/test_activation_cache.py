from pathlib import Path

import pytest
import torch
from torch import Tensor

from tfmq_export.ptq.walk.activation_cache import ActivationCache

ROWS = 10


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    numbers = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0)) * 1000
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def fill(cache: ActivationCache, name: str, rows: Tensor) -> None:
    """In uneven pieces, the way a walk writes them."""
    for start, stop in ((0, 3), (3, 4), (4, ROWS)):
        cache.write(name, start, rows[start:stop])


def files(cache: ActivationCache) -> list[Path]:
    folder = cache._folder
    return [] if folder is None else sorted(Path(folder.name).iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("ceiling", [None, 0])
def test_rows_come_back_as_they_were_written(dtype: torch.dtype, shape: tuple[int, ...], ceiling: int | None) -> None:
    wanted = values(dtype, shape)
    with ActivationCache(ROWS, ceiling) as cache:
        fill(cache, "x", wanted)

        for picks in ([0, 1, 2], [9, 0, 9, 4], [7], list(range(ROWS))):
            found = cache.read("x", torch.tensor(picks))

            assert found.dtype == dtype
            assert torch.equal(found, wanted[picks])
        assert bool(files(cache)) == (ceiling == 0)


def test_memory_and_disk_hold_the_same_rows() -> None:
    wanted, picks = values(torch.float32, (5, 6)), torch.tensor([8, 3, 3, 1])
    with ActivationCache(ROWS) as memory, ActivationCache(ROWS, 0) as disk:
        for cache in (memory, disk):
            fill(cache, "x", wanted.transpose(1, 2))  # not contiguous

        assert torch.equal(memory.read("x", picks), disk.read("x", picks))


def test_the_ceiling_is_kept_and_what_is_on_top_goes_to_disk() -> None:
    wanted = values(torch.float32, (8,))  # 320 bytes
    with ActivationCache(ROWS, 700) as cache:
        for name in "abcd":
            fill(cache, name, wanted)

        assert cache.resident_bytes == 640
        assert [file.stat().st_size for file in files(cache)] == [320, 320]
        assert all(torch.equal(cache.read(name, torch.arange(ROWS)), wanted) for name in "abcd")


def test_a_value_of_exactly_the_ceiling_fits() -> None:
    with ActivationCache(ROWS, 320) as cache:
        fill(cache, "a", values(torch.float32, (8,)))

        assert cache.resident_bytes == 320
        assert not files(cache)


def test_what_is_forgotten_makes_room_and_leaves_no_file() -> None:
    wanted = values(torch.float32, (8,))
    with ActivationCache(ROWS, 320) as cache:
        for name in "abc":
            fill(cache, name, wanted)
        assert len(files(cache)) == 2

        cache.keep({"c"})

        assert [name in cache for name in "abc"] == [False, False, True]
        assert cache.resident_bytes == 0
        assert len(files(cache)) == 1
        assert torch.equal(cache.read("c", torch.arange(ROWS)), wanted)
        fill(cache, "d", wanted)
        assert cache.resident_bytes == 320
        with pytest.raises(KeyError):
            cache.read("a", torch.tensor([0]))


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_outlives_the_cache_not_even_after_an_error(fails: bool) -> None:
    folder = None
    try:
        with ActivationCache(ROWS, 0) as cache:
            fill(cache, "x", values(torch.float32, (8,)))
            (file,) = files(cache)
            folder = file.parent
            if fails:
                raise RuntimeError("the walk broke")
    except RuntimeError:
        pass

    assert folder is not None
    assert not folder.exists()


def test_rows_can_be_written_again() -> None:
    first, second = values(torch.float32, (3,)), values(torch.float32, (3,)) + 1
    for ceiling in (None, 0):
        with ActivationCache(ROWS, ceiling) as cache:
            fill(cache, "x", first)
            cache.write("x", 2, second[2:5])

            expected = torch.cat((first[:2], second[2:5], first[5:]))
            assert torch.equal(cache.read("x", torch.arange(ROWS)), expected)
