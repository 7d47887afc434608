"""data.py: draws, Moving MNIST and moving digits against slow, literal versions, and MNIST's files."""

import hashlib
import math
import os
import shutil

import numpy as np
import pytest
import torch

import data

SETUPS = ("patch4", "fullres")


@pytest.fixture(scope="module", params=SETUPS)
def clips(request):
    return data.open_data("moving_digits", setup=request.param)


def test_an_epoch_of_a_fixed_set_is_a_permutation_and_batches_straddle_epochs():
    order = np.concatenate([data.fixed_order(3, i, 4, 10) for i in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert order[:10].tolist() != np.concatenate([data.fixed_order(4, i, 4, 10) for i in range(3)])[:10].tolist()
    assert (np.concatenate([data.fixed_order(3, i, 2, 10) for i in range(10)]) == order).all()


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
    assert clips.train(5, 3, 4, slice(1, None, 2)).equal(frames[1::2])                   # a process's share


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


def checksum(clips, start, stop):
    total = hashlib.sha256()
    for at in range(start, stop, 20):                             # twice as fast as by 100: they stay in the cache
        total.update((clips.test(at, min(at + 20, stop)) * 255).round().to(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


TRAJECTORIES = {"patch4": "42c33662aecd75ab", "fullres": "62f38d190d7b4978"}
FIRST_HUNDRED = {("moving_digits", "patch4"): "f5233bf096a1485b", ("moving_digits", "fullres"): "fc3f295a329bc751",
                 ("moving_mnist", "patch4"): "832982afc1016583", ("moving_mnist", "fullres"): "3852434dfa9f0d4f"}


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_clips(clips):
    for part in (lambda device: clips.train(1, 2, 8, device=device), lambda device: clips.test(0, 8, device)):
        assert part("cuda").cpu().equal(part("cpu"))


def test_without_a_network_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("http://127.0.0.1:9/", "http://127.0.0.1:9/"))
    with pytest.raises(data.DataError, match="--data moving_digits"):
        data.open_data("moving_mnist", tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_standard_test_file_is_used_where_it_lies(real_mnist, tmp_path):
    folder = shutil.copytree(real_mnist, tmp_path / "mnist")
    path = folder / "mnist_test_seq.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (20, 10_000, 64, 64))    # sparse: takes no room
    levels = torch.randint(0, 256, (20, 3, 64, 64), dtype=torch.uint8)
    array[:, 5:8] = levels.numpy()
    clips = data.open_data("moving_mnist", tmp_path)
    assert "mnist_test_seq.npy" in clips.test_set and clips.test_count == 10_000
    assert clips.test(5, 8).equal(levels.transpose(0, 1)[:, :, None] / torch.tensor(255.0))
    assert data.open_data("moving_mnist", tmp_path, frames_in=4, horizon=3).test(5, 8).equal(clips.test(5, 8)[:, :7])
    assert "generated" in data.open_data("moving_mnist", tmp_path, frames_in=10, horizon=20).test_set
    assert "generated" in data.open_data("moving_mnist", tmp_path, "fullres").test_set
    np.save(path, np.zeros((10, 20, 64, 64), np.uint8))
    with pytest.raises(data.DataError, match="mnist_test_seq.npy cannot be read: it has uint8 .*; remove it"):
        data.open_data("moving_mnist", tmp_path)
