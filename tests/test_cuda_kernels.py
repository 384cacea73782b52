"""The CUDA kernels against float64: their source emulated on the CPU and, where there is a GPU, run on it.

Broken copies of the source must fail the same checks.
"""

from __future__ import annotations

import kernel_checks as checks
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_emulator import KERNELS, SMALL, SMALL_HOPPER, EmulatedLauncher, build, missing, passes
from kernel_slips import SLIPS

from grads_dist.stats import cuda, cuda_driver, cuda_head, cuda_launch, cuda_outer, cuda_rows, ops
from grads_dist.stats.cuda_images import OUTER_SM90
from grads_dist.stats.cuda_tile import HopperTile, Tile
from grads_dist.stats.segments import Segments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
emulated = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> EmulatedLauncher:
    return EmulatedLauncher(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def hopper(emulator) -> EmulatedLauncher:
    """The emulator with the outer products for sm_90a."""
    return emulator.with_hopper(SMALL_HOPPER)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN and the largest integers: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def use(launcher, monkeypatch) -> None:
    monkeypatch.setattr(cuda_launch, "launcher_for", lambda _: launcher)


def device_of(name: str, request, monkeypatch) -> str:
    """Where a check's tensors lie; kernels on CPU tensors go to the emulator."""
    if name in ("emulator", "hopper"):
        use(request.getfixturevalue(name), monkeypatch)
        return "cpu"
    device = torch.device("cuda", 0)
    if reason := cuda_driver.unavailable_reason(device):
        pytest.skip(reason)
    if name == "mma.sync":
        use(cuda_driver.DeviceLauncher(device, cuda_driver.launcher_for(device).tile), monkeypatch)
    return "cuda:0"


def devices(*names: str) -> list:
    gpu = [name for name in names if name in ("cuda", "mma.sync") and torch.cuda.is_available()]
    return [*(pytest.param(name, marks=emulated) for name in names if name in ("emulator", "hopper")), *gpu]


@pytest.fixture(params=devices("emulator", "cuda"))
def device(request, monkeypatch) -> str:
    return device_of(request.param, request, monkeypatch)


@pytest.fixture(params=devices("emulator", "hopper", "cuda", "mma.sync"))
def outer_device(request, monkeypatch) -> str:
    """With each of the two kernels of outer products."""
    return device_of(request.param, request, monkeypatch)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [(70, 101), (1, 1), (64, 64), (5, 123), (200, 3)])
def test_outer_products(outer_device, shape, dtype):
    checks.check_outer(outer_device, shape, dtype)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 3, 0], [200], [1] * 40])
def test_outer_products_of_any_lengths(outer_device, lengths):
    checks.check_outer(outer_device, (70, 9), BF16, lengths)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    shape=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    dtype=st.sampled_from([BF16, FP16]),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_outer_products_of_any_shape(outer_device, lengths, shape, dtype):
    checks.check_total(outer_device, shape, dtype, lengths)
    checks.check_outer(outer_device, shape, dtype, lengths)


def test_errors_are_those_of_the_reference(outer_device):
    checks.check_outer_against_reference(outer_device)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [(70, 101), (640, 20)])
def test_batch_gradient(outer_device, shape, dtype):
    checks.check_total(outer_device, shape, dtype)


@pytest.mark.parametrize("name", devices("emulator", "mma.sync"))
def test_a_batch_gradient_of_the_same_tile_changes_no_bit(name, request, monkeypatch):
    device = device_of(name, request, monkeypatch)
    b, a = (checks.poisoned(82, n, BF16, device) for n in (70, 101))
    total = torch.zeros(70, 101, device=device)
    checks.assert_same_bits(checks.outer(b, a, [17, 65], total), checks.outer(b, a, [17, 65]))


def test_outer_product_of_nonfinite_numbers(outer_device):
    checks.check_outer_nonfinite(outer_device)


def test_outer_product_scales(outer_device):
    checks.check_outer_scales(outer_device)


def test_a_sample_does_not_depend_on_its_neighbours_or_place(outer_device):
    checks.check_outer_neighbours(outer_device)


def test_swapping_the_sides_transposes(outer_device):
    b, a = (checks.poisoned(82, n, BF16, outer_device, seed=n) for n in (70, 101))
    one, other = checks.outer(b, a, [17, 65]), checks.outer(a, b, [17, 65])
    assert torch.equal(one.min, other.min) and torch.equal(one.max, other.max)
    torch.testing.assert_close(one.sumsq, other.sumsq, rtol=1e-6, atol=0)


def test_rows_off_16_bytes_and_broadcast_rows_are_copied(outer_device):
    frame = checks.poisoned(40, 75, BF16, outer_device, pad=3)
    a, lengths = checks.poisoned(40, 9, BF16, outer_device), [17, 23]
    for b in (frame[:, 1:71], frame.t().contiguous().t()[:, :70], frame[:, :1].expand(40, 70)):
        plain = torch.zeros(40, 72, dtype=BF16, device=outer_device)[:, :70].copy_(b)
        checks.assert_same_bits(checks.outer(b, a, lengths), checks.outer(plain, a, lengths))


def test_more_samples_than_one_launch_has_room_for(outer_device, monkeypatch):
    b, a = (checks.poisoned(30, n, BF16, outer_device) for n in (70, 9))
    lengths, weights = [3, 0, 7, 10, 10], [1.0, 2.0, 3.0, 4.0, 5.0]
    whole = checks.outer(b, a, lengths)
    # Room for the partials of two samples, 8 warps' each with any of the tiles.
    monkeypatch.setattr(cuda, "PARTIALS_LIMIT", 2 * 8 * 32)
    total = torch.zeros(70, 9, device=outer_device)
    checks.assert_same_bits(checks.outer(b, a, lengths, total, weights), whole)
    gradients, _ = checks.outer_truth(b, a, lengths)
    truth = sum(w * g for w, g in zip(weights, gradients, strict=True))
    torch.testing.assert_close(total.double().cpu(), truth, rtol=1e-4, atol=1e-4)


def test_no_samples(device):
    b, a = (torch.zeros(0, n, dtype=BF16, device=device) for n in (7, 9))
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    for lengths in ([], [0, 0]):
        for found in (
            checks.outer(b, a, lengths),
            cuda_rows.vector_stats(b, lengths),
            cuda_rows.embedding_stats(b, cuda_rows.find_runs(ids, lengths, 5), 5),
        ):
            for name in checks.FIELDS:
                assert getattr(found, name).tolist() == [0] * len(lengths)
    assert cuda_head.softmax_gradient(b.float(), ids).loss.shape == (0,)
    assert cuda_head.column_bounds(b, b[:, 0].float(), [])[0].shape == (0, 7)


@pytest.mark.parametrize(("width", "dtype"), [(133, BF16), (128, FP16), (1, FP32), (130, FP32)])
def test_vectors(device, width, dtype):
    checks.check_vectors(device, width, dtype)


@pytest.mark.parametrize(("width", "dtype"), [(133, FP32), (64, BF16), (17, FP16)])
def test_sums_of_rows_are_the_references(device, width, dtype):
    checks.check_row_sums(device, width, dtype)


def test_vectors_of_nonfinite_numbers(device):
    checks.check_vector_nonfinite(device)


@pytest.mark.parametrize(
    ("width", "dtype", "padding_idx"), [(33, BF16, 3), (520, FP32, None), (8, FP16, 0), (33, FP32, 10)]
)
def test_embeddings(device, width, dtype, padding_idx):
    checks.check_embedding(device, width, dtype, padding_idx)


def test_runs_are_those_of_the_reference(device):
    lengths = [5, 0, 9]
    ids = torch.tensor([3, 1, 3, 3, 0, 2, 2, 2, 4, 1, 1, 4, 2, 0], device=device)
    b = checks.poisoned(14, 8, FP32, device)
    rows = ops.EmbeddingRows(b, ids, Segments(tuple(lengths)), padding_idx=1)
    runs = cuda_rows.find_runs(ids, lengths, 5, padding_idx=1)
    assert runs.run_offsets.tolist() == list(rows.segments.offsets)
    out = torch.zeros(rows.rows.shape[0], 8, device=device)
    cuda_rows.row_run_stats(b, runs, out)
    torch.testing.assert_close(out, rows.rows)


@pytest.mark.parametrize(
    ("width", "dtype", "out_dtype"),
    [(133, FP32, FP32), (2500, BF16, FP32), (264, BF16, BF16), (17, FP32, FP32)],
)
def test_softmax_gradient(device, width, dtype, out_dtype):
    checks.check_softmax(device, width, dtype, out_dtype)


def test_a_target_out_of_range_spoils_its_row_alone(device):
    logits = checks.poisoned(2, 9, FP32, device)
    softmax = logits.softmax(1)
    rows = cuda_head.softmax_gradient(logits, torch.tensor([-100, 2], device=device))
    assert rows.loss.isnan().tolist() == [True, False]
    torch.testing.assert_close(rows.gradient[0], softmax[0])


@pytest.mark.parametrize(("width", "dtype"), [(533, FP32), (40, BF16)])
def test_column_bounds(device, width, dtype):
    checks.check_column_bounds(device, width, dtype)


def test_results_repeat_to_the_bit(device):
    checks.check_repeats(device)


@emulated
@pytest.mark.parametrize("name", ["emulator", "hopper"])
def test_no_schedule_of_the_warps_changes_a_bit(name, request, monkeypatch):
    launcher = request.getfixturevalue(name)
    use(launcher, monkeypatch)
    b, a = (checks.poisoned(82, n, BF16, "cpu") for n in (70, 101))
    found = []
    for seed in (1, 2, 3):
        monkeypatch.setattr(launcher, "seed", seed)
        found.append(checks.outer(b, a, [17, 65], torch.zeros(70, 101), [1.0, 1.0]))
    for other in found[1:]:
        checks.assert_same_bits(other, found[0])


@emulated
@pytest.mark.parametrize(
    ("tile", "hopper_tile"),
    [(Tile(), None), (Tile(stages=3), None), (SMALL, HopperTile())],
    ids=["4 stages", "3 stages", "sm_90a"],
)
def test_the_tiles_that_devices_get(tile, hopper_tile, tmp_path, monkeypatch):
    use(EmulatedLauncher(tmp_path, tile, hopper_tile), monkeypatch)
    checks.check_outer("cpu", (136, 250), BF16, [0, 33, 65, 7])
    checks.check_total("cpu", (136, 130), BF16, [0, 33, 65, 7])


@emulated
def test_rows_that_overlap_are_copied_for_the_copy_engine(hopper, monkeypatch):
    use(hopper, monkeypatch)
    a, row = checks.poisoned(20, 9, BF16, "cpu"), torch.randn(72).to(BF16)[None, :70]
    expanded = checks.outer(row.expand(20, 70), a, [20])
    checks.assert_same_bits(expanded, checks.outer(row.repeat(20, 1), a, [20]))


def test_which_kernel_runs(emulator, hopper, monkeypatch):
    small, large = (torch.zeros(8, n, dtype=BF16) for n in (8, 64))
    offsets = torch.tensor([0, 8])

    def chosen(launcher, x, total=None) -> type:
        return type(cuda_outer.first_stage(launcher, cuda_outer.Operands(x, x, offsets, total, offsets)))

    assert chosen(emulator, large) is cuda_outer.MmaSync
    assert chosen(hopper, small) is chosen(hopper, large) is cuda_outer.Sm90
    monkeypatch.setattr(cuda_outer, "MMA_SYNC_BELOW", {False: 100})
    assert chosen(hopper, small) is cuda_outer.MmaSync and chosen(hopper, large) is cuda_outer.Sm90
    assert chosen(hopper, small, total=torch.zeros(8, 8)) is cuda_outer.Sm90


CASES = [
    pytest.param(file, check, old, new, id=name)
    for (file, check), slips in SLIPS.items()
    for name, (old, new) in slips.items()
]


@emulated
@pytest.mark.parametrize(("file", "check", "old", "new"), CASES)
def test_slips_are_noticed(file, check, old, new, emulator, hopper, tmp_path, monkeypatch):
    assert (KERNELS / "cuda" / file).read_text().count(old) == 1, "the slip needs a new place"
    compiled = file.replace(".cuh", ".cu")
    usual, tile = (hopper, SMALL_HOPPER) if file == OUTER_SM90 else (emulator, SMALL)
    library = build(compiled, tile, tmp_path, edit=lambda text: text.replace(old, new))
    use(usual.with_kernels(compiled, library), monkeypatch)
    assert not passes(lambda: getattr(checks, check)("cpu")), "the check passed on a broken kernel"
