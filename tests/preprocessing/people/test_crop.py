"""Crop that follows a face: constant size, whole face inside, within the picture, smooth."""

import numpy as np
import pytest

from preprocessing.people.crop import crop_boxes, cut_crops, share_inside, sharpness
from preprocessing.people.geometry import RotatedSquare, box_of, overlap, square_around

PICTURE = (480, 854)


def _faces(x, y, width=80.0, height=100.0):
    """Return boxes around moving centers."""
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    return np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)


def _crops(faces, *, size=(128, 128), margin=0.5, smooth_frames=10.0, picture=PICTURE):
    return crop_boxes(faces, picture, size=size, margin=margin, smooth_frames=smooth_frames)


def test_crop_has_the_margin_of_the_largest_face_and_the_ratio_of_the_target():
    faces = _faces(np.full(50, 400.0), 240.0)
    faces[20] += [-10, -10, 10, 10]  # 100 x 120 in one frame
    crops = _crops(faces, size=(96, 64))
    width, height = (crops[:, 2:] - crops[:, :2]).T
    assert np.allclose(height, 1.5 * width)
    assert np.allclose(width, 200) and np.allclose(height, 300)  # of the width; the height would need 240


@pytest.mark.parametrize("size", [(128, 128), (64, 128), (192, 96)])
def test_crop_stays_in_the_picture_with_the_whole_face(size):
    draw = np.random.default_rng(0)
    x = 427 + np.cumsum(draw.normal(0, 12, 200))
    faces = _faces(np.clip(x, 40, 814), 100 + 40 * np.sin(np.arange(200) / 9))
    crops = _crops(faces, size=size)
    assert crops[:, :2].min() >= -1e-9
    assert (crops[:, 2:] <= np.array(PICTURE[::-1]) + 1e-9).all()
    assert share_inside(faces, crops, PICTURE) == 1.0
    assert np.allclose(np.ptp(crops[:, 2] - crops[:, 0]), 0)


def test_jitter_of_the_face_does_not_move_the_crop():
    draw = np.random.default_rng(1)
    faces = _faces(427 + draw.normal(0, 3, 100), 240 + draw.normal(0, 3, 100))
    crops = _crops(faces)
    assert np.abs(np.diff(crops[:, 0])).max() < 0.4 < np.abs(np.diff(faces[:, 0])).mean()


def test_face_that_jumps_is_followed_at_once():
    faces = _faces(np.where(np.arange(100) < 50, 150.0, 700.0), 240.0)
    assert share_inside(faces, _crops(faces), PICTURE) == 1.0


def test_face_larger_than_the_picture_gives_the_largest_crop():
    faces = _faces(np.full(5, 400.0), 240.0, width=700, height=700)
    crops = _crops(faces)
    assert np.allclose(crops[0, 2:] - crops[0, :2], 480)
    assert share_inside(faces, crops, PICTURE) == 0.0


def test_crops_are_cut_at_their_boxes():
    frames = np.zeros((2, 40, 60, 3), np.uint8)
    frames[:, 10:20, 30:40] = 200
    crops = np.array([[30.0, 10.0, 40.0, 20.0], [0.0, 0.0, 10.0, 10.0]])
    cut = cut_crops(frames, crops, (8, 8))
    assert cut.shape == (2, 8, 8, 3)
    assert (cut[0, 2:-2, 2:-2] > 190).all() and (cut[1] == 0).all()


def test_blur_lowers_the_sharpness():
    from scipy.ndimage import gaussian_filter

    sharp = np.random.default_rng(0).integers(0, 255, (3, 120, 120, 3), dtype=np.uint8)
    soft = np.stack([gaussian_filter(frame, (3, 3, 0)) for frame in sharp])
    faces = np.tile([10.0, 10.0, 110.0, 110.0], (3, 1))
    assert sharpness(soft, faces, 1) < 0.05 * sharpness(sharp, faces, 1)


def test_square_is_upright_for_a_tilted_face():
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    local = np.array([[-20, -30], [20, -30], [20, 30], [-20, 30]], np.float64)
    points = local @ turn.T + [100, 80]
    square = square_around(points, (points[0], points[1]), 1.5)
    assert (square.x, square.y, square.side, square.angle) == pytest.approx((100, 80, 90, angle))
    back = square.to_frame(np.concatenate([local / 90 + 0.5, np.zeros((4, 1))], 1))
    assert np.allclose(back[:, :2], points, atol=1e-4)
    assert box_of(points) == pytest.approx((*points.min(0), *points.max(0)))


def test_square_is_cut_in_its_rotation():
    frame = np.zeros((100, 100, 3), np.uint8)
    frame[40:60, 20:80] = 255  # a bar across
    turned = RotatedSquare(x=50, y=50, side=60, angle=np.pi / 2).cut(frame, 30)
    assert (turned[:, 15] == 255).all()  # now a bar down
    assert (turned[15, :5] == 0).all()


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
