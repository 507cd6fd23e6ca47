"""Object ids from bytes, exact areas of them in windows, patches that show an object."""

import io

import numpy as np
import pytest
from PIL import Image

from drawn import covered, png, raw, two_discs
from golden_cases import load
from golden_odis_rows import check_patch_row
from selfsight.data.objects import object_map
from selfsight.data.source import SampleError
from selfsight.views.objects import Region, patches, rectangles
from selfsight.views.spec import Cells

# --- bytes to ids ----------------------------------------------------------------------------------------------------


def test_an_image_without_objects_has_no_map():
    assert object_map(raw()) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_are_read_as_stored(dtype):
    ids = np.array([[0, 1, 2], [3, 254, 200]], dtype)
    assert np.array_equal(object_map(raw(ids)), ids)


def test_255_is_ignored_in_8_bits_only():
    assert object_map(raw(np.array([[0, 255, 254]], np.uint8))).tolist() == [[0, 0, 254]]
    assert object_map(raw(np.array([[0, 255, 1000]], np.uint16))).tolist() == [[0, 255, 1000]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_indices_of_a_palette_count_and_not_its_colours(bits):
    ids = np.array([[0, 1], [1, 0]], np.uint8) * (1 if bits == 1 else 3)
    image = Image.fromarray(ids).convert("P")
    image.putdata(ids.flatten().tolist())
    image.putpalette([200, 10, 10] * 256)
    out = io.BytesIO()
    image.save(out, "PNG", bits=bits)
    assert out.getvalue()[24] == bits and out.getvalue()[25] == 3
    assert np.array_equal(object_map(raw(out.getvalue())), ids)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_of_few_bits_is_not_stretched(bits):
    top = 2**bits - 1
    assert object_map(raw(few_bits(bits, [0, 1, top, 0]))).tolist() == [[0, 1, top, 0]]


def few_bits(bits: int, row: list[int]) -> bytes:
    """A gray PNG of one row, written by hand: Pillow writes 8 and 16 bits only."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = sum(value << bits * (len(row) - 1 - i) for i, value in enumerate(row)) << -len(row) * bits % 8
    line = b"\0" + packed.to_bytes((len(row) * bits + 7) // 8, "big")
    head = struct.pack(">IIBBBBB", len(row), 1, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("L", (9, 9)).save(out, "JPEG")
    return out.getvalue()


GOOD = png(np.arange(10_000, dtype=np.uint16).reshape(100, 100))
HUGE = GOOD[:16] + (60_000).to_bytes(4, "big") * 2 + GOOD[24:]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"objects\.png is empty"),
        (jpeg(), r"objects\.png is no PNG image"),
        (png(np.zeros((4, 4, 3), np.uint8)), r"objects\.png has RGB pixels; write the ids as one channel"),
        (png(np.zeros((4, 4, 4), np.uint8)), "has RGBA pixels"),
        (GOOD[: len(GOOD) // 2], r"objects\.png is truncated or damaged"),
        (HUGE, r"objects\.png says 60000 x 60000 pixels, more than the limit"),
        (b"\x80\x04\x95 a pickle", "no PNG image"),
    ],
)
def test_a_malformed_map_names_file_and_key(data, words):
    with pytest.raises(SampleError, match=rf"^t\.tar, key k: .*{words}"):
        object_map(raw(data))


def test_a_map_in_a_side_car_names_that_file():
    with pytest.raises(SampleError, match=r"^objects/t\.tar, key k: objects\.png is no PNG"):
        object_map(raw(b"x")._replace(side="objects/t.tar, key k"))


def test_boxes_are_painted_largest_first_with_ids_by_position():
    boxes = {"boxes": [[1, 1, 3, 3], [0, 0, 6, 5], [4, 2, 6, 4]], "size": [5, 7]}
    assert object_map(raw(boxes=boxes)).tolist() == [
        [2, 2, 2, 2, 2, 2, 0],
        [2, 1, 1, 2, 2, 2, 0],
        [2, 1, 1, 2, 3, 3, 0],
        [2, 2, 2, 2, 3, 3, 0],
        [2, 2, 2, 2, 2, 2, 0],
    ]


def test_boxes_may_carry_scores_and_ids():
    boxes = {"boxes": [[0, 0, 1, 1, 0.9, 700], [1, 0, 2, 1, 0.1, 7], [2, 0, 3, 1, 0.5, 700]], "size": [1, 4]}
    assert object_map(raw(boxes=boxes)).tolist() == [[700, 7, 700, 0]]
    with_scores = {"boxes": [[0, 0, 1, 1, 0.9], [1, 0, 2, 1, 0.1]], "size": [1, 4]}
    assert object_map(raw(boxes=with_scores)).tolist() == [[1, 2, 0, 0]]


def test_large_images_get_a_map_of_256_pixels_and_slivers_one():
    ids = object_map(raw(boxes={"boxes": [[500, 0, 1000, 250], [10, 490, 10.5, 490.5]], "size": [500, 1000]}))
    assert ids.shape == (128, 256) and (ids == 1).sum() == 128 * 64 and ids[:64, 128:].all()
    assert np.argwhere(ids == 2).tolist() == [[125, 3]]


def test_boxes_reach_no_further_than_the_image():
    ids = object_map(raw(boxes={"boxes": [[-9, -9, 2, 2], [4, 4, 9, 9], [7, 7, 9, 9]], "size": [5, 5]}))
    assert (ids == 1).sum() == 4 and (ids == 2).sum() == 1 and not (ids == 3).any()


def test_no_boxes_are_no_objects():
    assert not object_map(raw(boxes={"boxes": [], "size": [4, 6]})).any()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not of the form"),
        (b"[]", "is not of the form"),
        (b"[" * 100_000, "is not of the form"),
        ({"boxes": []}, "is not of the form"),
        ({"boxes": [[1, 2, 3, 4], [1, 2]], "size": [9, 9]}, "is not of the form"),
        ({"boxes": [[1, 2, 3]], "size": [9, 9]}, "rows of 4, 5 or 6 numbers"),
        ({"boxes": [["1", "2", "3", "4"]], "size": [9, 9]}, "rows of 4, 5 or 6 numbers"),
        ({"boxes": [[1, 2, 3, 10**400]], "size": [9, 9]}, "rows of 4, 5 or 6 numbers"),
        ({"boxes": [[3, 2, 1, 4]], "size": [9, 9]}, r"\[3, 2, 1, 4\] is no box; expected x1 <= x2"),
        ({"boxes": [[1, 2, float("nan"), 4]], "size": [9, 9]}, "is no box"),
        ({"boxes": [], "size": [0, 9]}, r'"size" is \[0, 9\]; expected \[height, width\]'),
        ({"boxes": [], "size": 9}, '"size" is 9'),
        ({"boxes": [[1, 2, 3, 4, 0.5, 0]], "size": [9, 9]}, "id 0 is not a whole number from 1"),
        ({"boxes": [[1, 2, 3, 4, 0.5, 1.5]], "size": [9, 9]}, "id 1.5 is not a whole number"),
    ],
)
def test_malformed_boxes_name_file_and_key(data, words):
    with pytest.raises(SampleError, match=rf"^t\.tar, key k: boxes\.json.*{words}"):
        object_map(raw(boxes=data))


# --- areas and patches -----------------------------------------------------------------------------------------------


def test_areas_are_exact_where_edges_fall_on_pixels():
    ids = two_discs()
    region = Region(ids, 1)
    assert region.size == (ids == 1).sum()
    rng = np.random.default_rng(0)
    for _ in range(50):
        y0, x0 = rng.integers(0, 40), rng.integers(0, 50)
        y1, x1 = rng.integers(y0 + 1, 49), rng.integers(x0 + 1, 65)
        assert region.area(np.array([y0, x0, y1, x1]), 48, 64) == (ids[y0:y1, x0:x1] == 1).sum()


def test_areas_are_exact_where_edges_cut_pixels():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 2, (5, 7))  # every image of 15 x 28 pixels cuts each of these into 3 x 4
    region = Region(ids, 1)
    for _ in range(50):
        y0, x0 = rng.integers(0, 14), rng.integers(0, 27)
        box = np.array([y0, x0, rng.integers(y0 + 1, 16), rng.integers(x0 + 1, 29)], np.float32)
        assert region.area(box, 15, 28) == pytest.approx(covered(ids == 1, box, 15, 28), abs=1e-9)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_occupancy_of_patches_equals_counting_points(grid):
    ids = two_discs((24, 32))
    box, size = np.array([30, 20, 300, 320], np.float32), (360, 480)  # patches cut both pixels and the map
    edges = [np.linspace(box[i], box[i + 2], grid[i] + 1) for i in (0, 1)]
    for threshold in (0.05, 0.25, 0.6, 1.0):
        mine = patches(Region(ids, 1), box, *size, Cells("global", grid, threshold=threshold))
        for (i, j), on in np.ndenumerate(mine):
            ys = np.linspace(edges[0][i], edges[0][i + 1], 401)[:-1] + np.diff(edges[0])[0] / 800
            xs = np.linspace(edges[1][j], edges[1][j + 1], 401)[:-1] + np.diff(edges[1])[0] / 800
            seen = ids[(ys * 24 / 360).astype(int)][:, (xs * 32 / 480).astype(int)] == 1
            if abs(seen.mean() - threshold) > 0.01:
                assert on == (seen.mean() > threshold)


def test_a_patch_counts_at_exactly_the_threshold():
    ids, box = np.zeros((8, 8), np.uint8), np.array([0, 0, 8, 8], np.float32)
    ids[4:, 4:], ids[:2, :2] = 1, 1  # the last of 2 x 2 patches, and a quarter of the first
    assert patches(Region(ids, 1), box, 8, 8, Cells("global", (2, 2))).tolist() == [[1, 0], [0, 1]]
    ids[1, 1] = 0
    assert patches(Region(ids, 1), box, 8, 8, Cells("global", (2, 2))).tolist() == [[0, 0], [0, 1]]


def test_a_small_object_still_gets_the_patch_that_shows_most_of_it():
    ids = np.zeros((64, 64), np.uint8)
    ids[31:33, 40:44] = 1
    ids[31, 40] = 0
    mine = patches(Region(ids, 1), np.array([0, 0, 64, 64]), 64, 64, Cells("global", (4, 4)))
    assert mine.sum() == 1 and mine[2, 2] == 1
    assert not patches(Region(ids, 1), np.array([0, 0, 31, 64]), 64, 64, Cells("global", (4, 4))).any()


def groups_by_hand(on: np.ndarray) -> np.ndarray:
    """Bounding boxes of 8-connected groups by growing one pixel at a time."""
    filled, left = np.zeros(on.shape, np.uint8), {tuple(p) for p in np.argwhere(on).tolist()}
    while left:
        group = {left.pop()}
        while grown := {p for p in left if any(max(abs(p[0] - q[0]), abs(p[1] - q[1])) == 1 for q in group)}:
            group, left = group | grown, left - grown
        ys, xs = zip(*group)
        filled[min(ys) : max(ys) + 1, min(xs) : max(xs) + 1] = 1
    return filled


@pytest.mark.parametrize("shape", [(4, 4), (7, 11), (14, 14), (3, 40)])
def test_rectangles_are_the_bounding_boxes_of_the_groups(shape):
    for seed in range(20):
        on = np.random.default_rng(seed).random(shape) < (0.15, 0.3, 0.5)[seed % 3]
        assert np.array_equal(rectangles(on), groups_by_hand(on))


def test_rectangles_grow_by_the_margin_inside_the_grid():
    on = np.zeros((5, 6), bool)
    on[0, 0] = on[3, 4] = True
    expected = np.zeros((5, 6), np.uint8)
    expected[:2, :2] = expected[2:5, 3:6] = 1
    assert np.array_equal(rectangles(on, 1), expected)


def test_the_rule_for_boxes_is_that_of_the_reference():
    check_patch_row(*load("odis", "patch_row_margin0"))
