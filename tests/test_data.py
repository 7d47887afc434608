"""data.py: draws, Moving MNIST and moving digits against slow, literal versions, and MNIST's files."""

import gzip
import hashlib
import http.server
import math
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

import data

SETUPS = ("patch4", "fullres")
T10K = "t10k-images-idx3-ubyte"


@pytest.fixture(scope="module", params=SETUPS)
def clips(request):
    return data.open_data("moving_digits", setup=request.param)


# ---------------------------------------------------------------------------------------------------------------- draws

def test_draws_are_the_raw_output_of_philox():
    expected = np.random.Philox(key=[7, (data.TEST << 56) + 3]).random_raw(6)
    low_first = [value >> shift & 0xFFFFFFFF for value in expected.tolist() for shift in (0, 32)]
    assert data.draws(data.TEST, 7, 3, 4, 3).ravel().tolist() == low_first


def test_rows_do_not_depend_on_how_many_are_drawn():
    for columns in (1, 3, 10):
        assert (data.draws(data.TRAIN, 1, 2, 7, columns)[:3] == data.draws(data.TRAIN, 1, 2, 3, columns)).all()


def test_streams_seeds_and_steps_differ():
    seen = {data.draws(*key, 1, 4).tobytes() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -1, 0))}
    assert len(seen) == 5


def test_below_covers_its_range_evenly():
    edge = np.array([0, 2**32 - 1], np.uint32)
    assert data.below(edge, 5).tolist() == [0, 4]
    assert data.below(edge, 36 * 2**24 + 1).tolist() == [0, 36 * 2**24]
    counts = np.bincount(data.below(data.draws(0, 0, 0, 10_000, 1)[:, 0], 5), minlength=5)
    assert len(counts) == 5 and abs(counts - 2000).max() < 200


def test_an_epoch_of_a_fixed_set_is_a_permutation_and_batches_straddle_epochs():
    order = np.concatenate([data.fixed_order(3, i, 4, 10) for i in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert order[:10].tolist() != np.concatenate([data.fixed_order(4, i, 4, 10) for i in range(3)])[:10].tolist()
    assert (np.concatenate([data.fixed_order(3, i, 2, 10) for i in range(10)]) == order).all()


# --------------------------------------------------------------------------------------------------------- trajectories

def raw_for(start=(2**31, 2**31), direction=0, speed=0, which=0):
    """Raw draws of one sequence, both digits alike."""
    return np.array([[which, *start, direction, speed] * 2], np.uint32)


def test_patch4_moves_first_by_3_6_pixels_and_truncates():
    _, corners = data.trajectories(raw_for(), "patch4", 9, 10)       # from 18, to the right
    assert corners[0, :, 0, 0].tolist() == [18] * 9
    # 21.6 25.2 28.8 32.4 36.0, back 32.4 28.8 25.2 21.6
    assert corners[0, :, 0, 1].tolist() == [21, 25, 28, 32, 36, 32, 28, 25, 21]


def test_patch4_clamps_to_the_edge_and_turns():
    _, corners = data.trajectories(raw_for(start=(0, 0), direction=2**31), "patch4", 3, 10)    # from 0, to the left
    assert corners[0, :, 1, 1].tolist() == [0, 3, 7]
    raw = data.draws(data.TRAIN, 0, 0, 2000, 10)
    _, corners = data.trajectories(raw, "patch4", 20, 10)
    assert corners.min() == 0 and corners.max() == 36


def test_fullres_starts_where_it_starts_and_passes_the_edge_by_two():
    _, corners = data.trajectories(raw_for(speed=2**32 - 1), "fullres", 7, 10)                 # 6 pixels a frame
    assert corners[0, :, 0, 1].tolist() == [18, 24, 30, 36, 30, 24, 18]
    _, corners = data.trajectories(raw_for(start=(0, 0), direction=2**31), "fullres", 5, 10)   # 2 pixels a frame
    assert corners[0, :, 0, 1].tolist() == [0, -2, 0, 2, 4]
    _, corners = data.trajectories(data.draws(data.TRAIN, 0, 0, 2000, 10), "fullres", 20, 10)
    assert corners.min() == -1 and corners.max() == 37       # from -1.99 to 37.99, toward zero


def test_fullres_speeds_are_whole_numbers_from_two_to_six():
    for part, speed in enumerate((2, 3, 4, 5, 6)):
        raw = raw_for(start=(0, 0), direction=0, speed=int((part + 0.5) * 2**32 / 5))
        _, corners = data.trajectories(raw, "fullres", 6, 10)
        assert corners[0, :, 0, 1].tolist() == [speed * t for t in range(6)]


def literal_sequence(digits, raw, setup, frames):
    """One sequence in plain Python: one digit, one frame, one pixel at a time."""
    film = [[[0] * 64 for _ in range(64)] for _ in range(frames)]
    for number in range(2):
        which, y, x, direction, speed = (int(value) for value in raw[5 * number:5 * number + 5])
        digit = digits[which * len(digits) // 2**32]
        position = [y * (36 * 2**24 + 1) // 2**32, x * (36 * 2**24 + 1) // 2**32]
        pace = 2 + speed * 5 // 2**32 if setup == "fullres" else 3.6
        angle = 2 * math.pi * direction / 2**32
        velocity = [round(pace * math.sin(angle) * 2**24), round(pace * math.cos(angle) * 2**24)]
        for t in range(frames):
            for axis in range(2):
                if setup == "patch4":
                    position[axis] += velocity[axis]
                    if not 0 <= position[axis] <= 36 * 2**24:
                        position[axis] = min(max(position[axis], 0), 36 * 2**24)
                        velocity[axis] = -velocity[axis]
            corner = [int(p / 2**24) for p in position]    # toward zero
            for row in range(28):
                for column in range(28):
                    y, x, level = corner[0] + row, corner[1] + column, int(digit[row][column])
                    if 0 <= y < 64 and 0 <= x < 64:
                        old = film[t][y][x]
                        film[t][y][x] = min(old + level, 255) if setup == "fullres" else max(old, level)
            for axis in range(2):
                if setup == "fullres":
                    if not -2 * 2**24 <= position[axis] + velocity[axis] <= 38 * 2**24:
                        velocity[axis] = -velocity[axis]
                    position[axis] += velocity[axis]
    return film


@pytest.mark.parametrize("setup", SETUPS)
def test_the_batch_is_what_a_literal_generator_makes(setup):
    digits = data.stroke_digits(40, 5)
    clips = data.MovingDigits("moving_digits", digits, digits, 10, setup)
    if setup == "patch4":
        raw = data.draws(data.TRAIN, 9, 4, 6, 10)
    else:
        raw = data.draws(data.TRAIN, data.FIXED_SEED, 0, 10_500, 10)[data.fixed_order(9, 4, 6, 10_500)]
    expected = np.array([literal_sequence(digits[:30], row, setup, 20) for row in raw])
    frames = clips.train(9, 4, 6)
    assert frames.shape == (6, 20, 1, 64, 64) and frames.dtype == torch.float32
    assert (frames[:, :, 0].numpy() == (expected / np.float32(255)).astype(np.float32)).all()
    assert (expected == 255).any() and (expected == 0).any()


def pad(digits):
    return torch.from_numpy(np.pad(digits, ((0, 0), (1, 1), (1, 1))))


def test_overlap_is_the_maximum_or_a_sum_that_clips():
    padded = pad(np.stack([np.full((28, 28), 200, np.uint8), np.full((28, 28), 100, np.uint8)]))
    which = torch.tensor([[0, 1], [1, 1]])
    corners = torch.tensor([[3, 5], [3, 5]]).expand(2, 1, 2, 2)
    for overlap, levels in (("max", [200, 100]), ("add", [255, 200])):
        frames = data.draw_digits(padded, which, corners, overlap)
        assert frames[:, 0, 0, 10, 10].tolist() == levels
        assert (frames > 0).sum().item() == 2 * 28 * 28


def test_what_leaves_the_canvas_is_cut_off():
    padded = pad(np.full((1, 28, 28), 255, np.uint8))
    corners = torch.tensor([[[-2, 38], [-2, 38]]])[None]
    frame = data.draw_digits(padded, torch.zeros(1, 2, dtype=torch.long), corners, "max")[0, 0, 0]
    expected = torch.zeros(64, 64, dtype=torch.uint8)
    expected[:26, 38:] = 255
    assert frame.equal(expected)


# ------------------------------------------------------------------------------------------------------- moving digits

def test_clips_are_what_the_interface_says(clips):
    assert clips.name == "moving_digits" and clips.name in clips.test_set and "mnist" not in clips.test_set.lower()
    assert (clips.channels, clips.size, clips.frames_in, clips.horizon, clips.test_horizon) == (1, (64, 64), 10, 10, 10)
    assert (clips.train_count, clips.test_count) == ((10_500, 4_500) if clips.setup == "fullres" else (None, 10_000))
    for frames in (clips.train(0, 0, 3), clips.valid(0, 3), clips.test(0, 3)):
        assert frames.shape == (3, 20, 1, 64, 64) and frames.dtype == torch.float32
        assert frames.min() == 0 and frames.max() == 1
    assert not clips.masked and not clips.own and clips.to_units(frames) is frames and clips.unit is None
    assert clips.test_units(0, 3).equal(clips.test(0, 3).double()) and len(clips.info()["checksum"]) == 16
    assert clips.info()["test_count"] == clips.test_count


def test_a_batch_is_a_function_of_seed_and_iteration(clips):
    again = data.open_data("moving_digits", setup=clips.setup)
    clips.train(5, 0, 4)
    frames = clips.train(5, 3, 4)
    assert frames.equal(again.train(5, 3, 4))
    assert not frames.equal(clips.train(6, 3, 4)) and not frames.equal(clips.train(5, 2, 4))


def test_a_share_is_cut_out_of_the_whole_batch(clips):
    whole = clips.train(1, 2, 6)
    for share in (slice(0, None, 2), slice(1, None, 2), slice(4, 6)):
        assert clips.train(1, 2, 6, share).equal(whole[share])


def test_a_sequence_does_not_depend_on_the_batch_size():
    clips = data.open_data("moving_digits")
    assert clips.train(1, 2, 9)[:4].equal(clips.train(1, 2, 4))


def test_fixed_sets_do_not_depend_on_how_they_are_cut(clips):
    for part in (clips.valid, clips.test):
        assert torch.cat([part(0, 3), part(3, 5)]).equal(part(0, 5))
        assert not part(0, 1).equal(part(1, 2))
    assert len(clips.test(clips.test_count - 2, clips.test_count + 2)) == 2
    assert len(clips.valid(0, 10**6)) == clips.valid_count


def test_parts_share_no_digit(clips):
    digits = {part: {digit.tobytes() for digit in images} for part, images in clips._digits.items()}
    assert [len(digits[part]) for part in ("train", "valid", "test")] == [2000, 200, 500]
    assert not (digits["train"] & digits["valid"] | digits["train"] & digits["test"] | digits["valid"] & digits["test"])


def test_other_lengths():
    clips = data.open_data("moving_digits", frames_in=3, horizon=7)
    assert clips.train(0, 0, 2).shape == clips.test(0, 2).shape == (2, 10, 1, 64, 64)
    assert clips.train(0, 0, 2).equal(data.open_data("moving_digits").train(0, 0, 2)[:, :10])


def test_drawn_digits_look_like_ten_classes_and_take_no_time():
    start, draw = time.process_time(), data.stroke_digits.__wrapped__         # anew each time
    digits = draw(2500, 0)
    assert time.process_time() - start < 2
    assert (digits == draw(2500, 0)).all() and not (digits[:500] == data.stroke_digits(500, 1)).all()
    ink = (digits > 127).mean((1, 2))
    assert 0.03 < ink.min() and ink.max() < 0.4
    means = np.stack([digits[label::10].mean(0) for label in range(10)]).reshape(10, -1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    guess = (data.stroke_digits(500, 1).reshape(500, -1) @ means.T).argmax(1)
    assert (guess == np.arange(500) % 10).mean() > 0.8           # the nearest mean image tells the classes apart


def checksum(clips, start, stop):
    total = hashlib.sha256()
    for at in range(start, stop, 20):                             # twice as fast as by 100: they stay in the cache
        total.update((clips.test(at, min(at + 20, stop)) * 255).round().to(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


TRAJECTORIES = {"patch4": "42c33662aecd75ab", "fullres": "62f38d190d7b4978"}
FIRST_HUNDRED = {("moving_digits", "patch4"): "f5233bf096a1485b", ("moving_digits", "fullres"): "fc3f295a329bc751",
                 ("moving_mnist", "patch4"): "832982afc1016583", ("moving_mnist", "fullres"): "3852434dfa9f0d4f"}
ALL = {"patch4": "1f4a456fc8cce399", "fullres": "d9fce617f694fe6a"}


@pytest.mark.parametrize("setup", SETUPS)
def test_the_generated_test_sets_are_pinned(setup, real_mnist):
    """The trajectories of every test sequence, and the pixels of the first hundred."""
    clips = data.open_data("moving_mnist", real_mnist.parent, setup)
    which, corners = data.trajectories(clips._tables["test"], setup, 20, 10_000)
    numbers = np.concatenate([which.ravel(), corners.ravel()]).astype("<i4").tobytes()
    assert hashlib.sha256(numbers).hexdigest()[:16] == TRAJECTORIES[setup]
    assert checksum(clips, 0, 100) == FIRST_HUNDRED["moving_mnist", setup]


@pytest.mark.parametrize("setup", SETUPS)
def test_the_moving_digits_test_set_is_pinned(setup):
    assert checksum(data.open_data("moving_digits", setup=setup), 0, 100) == FIRST_HUNDRED["moving_digits", setup]


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_all_of_the_generated_test_set_is_pinned(setup, real_mnist):
    clips = data.open_data("moving_mnist", real_mnist.parent, setup)
    assert checksum(clips, 0, clips.test_count) == ALL[setup]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_clips(clips):
    for part in (lambda device: clips.train(1, 2, 8, device=device), lambda device: clips.test(0, 8, device)):
        assert part("cuda").cpu().equal(part("cpu"))


# -------------------------------------------------------------------------------------------------------- MNIST's files

def test_moving_mnist_from_the_real_files(real_mnist):
    clips = data.open_data("moving_mnist", real_mnist.parent)
    assert clips.name == "moving_mnist" and clips.test_count == 10_000
    assert [len(clips._digits[part]) for part in ("train", "valid", "test")] == [58_000, 2_000, 10_000]
    for frames in (clips.train(0, 0, 4), clips.valid(0, 4), clips.test(0, 4)):
        assert 0.02 < frames.mean() < 0.09                       # a digit covers about 100 of 784 pixels


@pytest.fixture
def mirror(tmp_path_factory, monkeypatch):
    """A local server that stands for both mirrors; `mirror.answers` lists what it sends."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            mirror.asked.append(self.path)
            length, content = mirror.answers.pop(0)
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    mirror = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    mirror.asked, mirror.answers = [], []
    threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{mirror.server_port}"
    monkeypatch.setattr(data, "MNIST_MIRRORS", (f"{url}/one/", f"{url}/two/"))
    yield mirror
    mirror.shutdown()
    mirror.server_close()


def test_missing_files_are_downloaded_from_the_first_mirror_that_has_them(real_mnist, tmp_path, mirror):
    whole = (real_mnist / f"{T10K}.gz").read_bytes()
    foreign = gzip.compress(b"something else")
    mirror.answers += [(len(foreign), foreign), (len(whole), whole)]
    digits = data.mnist_digits(tmp_path / "data" / "mnist", T10K)
    assert mirror.asked == [f"/one/{T10K}.gz", f"/two/{T10K}.gz"]
    assert (digits == data.mnist_digits(real_mnist, T10K)).all()
    assert os.listdir(tmp_path / "data" / "mnist") == [f"{T10K}.gz"]
    data.mnist_digits(tmp_path / "data" / "mnist", T10K)
    assert len(mirror.asked) == 2


def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(tmp_path, mirror):
    mirror.answers += [(10**6, b"cut off"), (5, b"<htm>")]
    with pytest.raises(data.DataError) as error:
        data.mnist_digits(tmp_path, T10K)
    text = str(error.value)
    assert T10K in text and str(tmp_path) in text and "--data moving_digits" in text and "\n" not in text
    assert os.listdir(tmp_path) == []


def test_without_a_network_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("http://127.0.0.1:9/", "http://127.0.0.1:9/"))
    with pytest.raises(data.DataError, match="--data moving_digits"):
        data.open_data("moving_mnist", tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_standard_test_file_is_used_where_it_lies(real_mnist, tmp_path):
    for name in data.MNIST_FILES:
        shutil.copy(real_mnist / f"{name}.gz", tmp_path / f"{name}.gz")
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name in data.MNIST_FILES:
        shutil.move(tmp_path / f"{name}.gz", folder)
    path = folder / "mnist_test_seq.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (20, 10_000, 64, 64))    # sparse: takes no room
    levels = torch.randint(0, 256, (20, 3, 64, 64), dtype=torch.uint8)
    array[:, 5:8] = levels.numpy()
    del array
    clips = data.open_data("moving_mnist", tmp_path)
    assert "mnist_test_seq.npy" in clips.test_set and clips.test_count == 10_000
    assert clips.test(5, 8).equal(levels.transpose(0, 1)[:, :, None] / torch.tensor(255.0))
    assert data.open_data("moving_mnist", tmp_path, frames_in=4, horizon=3).test(5, 8).equal(clips.test(5, 8)[:, :7])
    assert "generated" in data.open_data("moving_mnist", tmp_path, frames_in=10, horizon=20).test_set
    assert "generated" in data.open_data("moving_mnist", tmp_path, "fullres").test_set
    with open(path, "r+b") as file:
        file.truncate(10_000_000)
    with pytest.raises(data.DataError, match="mnist_test_seq.npy cannot be read: .*; remove it"):
        data.open_data("moving_mnist", tmp_path)
    np.save(path, np.zeros((10, 20, 64, 64), np.uint8))
    with pytest.raises(data.DataError, match="mnist_test_seq.npy cannot be read: it has uint8"):
        data.open_data("moving_mnist", tmp_path)
