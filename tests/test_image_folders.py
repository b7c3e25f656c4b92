"""Image folders become examples: classes, groups and columns from subfolders and tables, pictures read on access."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import coar
from coar.errors import ExamplesError

NAMES = ("cat/day/1.png", "cat/night/2.PNG", "dog/day/3.jpg", "dog/night/4.png")


def write(folder, names=NAMES, mode="RGB"):
    """Pictures of 6 by 4 pixels, each of one colour, or one grey, that its number gives."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (6, 4), 40 * i if mode == "L" else (40 * i, 20 * i, 10 * i)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_classes_and_groups_are_subfolders(tmp_path):
    found = coar.Examples.from_folder(write(tmp_path), group="light", transform=transforms.ToTensor())
    assert found.targets.tolist() == [0, 0, 1, 1]
    assert {name: column.tolist() for name, column in found.metadata.items()} == {
        "file": list(NAMES),
        "light": ["day", "night"] * 2,
        "class_name": ["cat", "cat", "dog", "dog"],
        "id": [0, 1, 2, 3],
        "label": [0, 0, 1, 1],
    }
    inputs, targets = found.block(1, 4)
    assert inputs.shape == (3, 3, 4, 6)
    colours = np.outer([1, 2, 3], [40, 20, 10])
    np.testing.assert_allclose(inputs.mean((2, 3)) * 255, colours, atol=2)  # a JPEG among them
    assert targets.tolist() == [0, 1, 1]
    torch.testing.assert_close(found.subset([3]).block(0, 1)[0], found.block(3, 4)[0])


def test_grey_pictures_have_three_channels_and_numbers_from_0_to_1(tmp_path, caplog):
    found = coar.Examples.from_folder(write(tmp_path, ("a/1.png", "a/2.png"), "L"))
    inputs, _ = found.block(0, 2)
    np.testing.assert_allclose(inputs, np.broadcast_to(np.reshape([0, 40 / 255], (2, 1, 1, 1)), (2, 3, 4, 6)))
    assert "without a transform" in caplog.text


TABLE = "file_name,light,minute,weight,label\n"
ROWS = [f"{name},{['day', 'night'][i % 2]},{10 * i},{i / 4},{2 - i // 2}\n" for i, name in enumerate(NAMES)]


def test_a_table_adds_columns_and_may_hold_the_classes(tmp_path):
    write(tmp_path)
    (tmp_path / "metadata.csv").write_text("\ufeff" + TABLE + "".join(reversed(ROWS)))
    found = coar.Examples.from_folder(tmp_path, group="light")
    assert found.metadata["light"].tolist() == ["day", "night"] * 2
    assert found.metadata["minute"].tolist() == [0, 10, 20, 30]
    assert found.metadata["weight"].tolist() == [0, 0.25, 0.5, 0.75]
    assert found.targets.tolist() == [0, 0, 1, 1]
    by_column = coar.Examples.from_folder(tmp_path, label="label")
    assert by_column.targets.tolist() == [1, 1, 0, 0]
    assert by_column.metadata["class_name"].tolist() == ["2", "2", "1", "1"]
    goal = coar.EditGoal(
        targets="light == 'night'", references="minute < 30 and light != 'night'", direction="increase"
    )
    assert [rows.tolist() for rows in goal.resolve(found.metadata)] == [[1, 3], [0, 2]]


def test_classes_are_those_of_the_model(tmp_path):
    found = coar.Examples.from_folder(write(tmp_path), classes=("fish", "dog", "cat"))
    assert found.targets.tolist() == [2, 2, 1, 1]
    (tmp_path / "bird").mkdir()
    assert coar.Examples.from_folder(tmp_path).targets.tolist() == [1, 1, 2, 2]
    with pytest.raises(ExamplesError, match="has the class 'dog', and the classes are cat"):
        coar.Examples.from_folder(tmp_path, classes=["cat"])


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ExamplesError, match="is not a folder"):
        coar.Examples.from_folder(tmp_path / "none")
    with pytest.raises(ExamplesError, match=r"has no files that end in \.jpg"):
        coar.Examples.from_folder(tmp_path)
    write(tmp_path)
    Image.new("RGB", (6, 4)).save(tmp_path / "cat/0.png")
    with pytest.raises(ExamplesError, match=r"no metadata.csv with a column 'light', and 'cat/0.png' .* class/group/"):
        coar.Examples.from_folder(tmp_path, group="light")
    with pytest.raises(ExamplesError, match="has no column 'kind'"):
        coar.Examples.from_folder(tmp_path, label="kind")
    (tmp_path / "metadata.csv").write_text(TABLE + "".join(ROWS))
    with pytest.raises(ExamplesError, match=r"no row for 1 pictures, first 'cat/0\.png'"):
        coar.Examples.from_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("name,light\n1,2\n")
    with pytest.raises(ExamplesError, match="has name, light; it needs a column 'file_name'"):
        coar.Examples.from_folder(tmp_path)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "flat/0.png")
    with pytest.raises(ExamplesError, match=r"classes are subfolders, and '0.png' .* is not in a subfolder class/"):
        coar.Examples.from_folder(tmp_path / "flat")


def test_damaged_and_unequal_pictures_are_named(tmp_path):
    write(tmp_path)
    found = coar.Examples.from_folder(tmp_path)
    (tmp_path / NAMES[2]).write_bytes(b"no picture")
    with pytest.raises(ExamplesError, match=r"cannot read the picture .*3\.jpg"):
        found.block(0, 4)
    Image.new("RGB", (5, 4)).save(tmp_path / NAMES[2])
    with pytest.raises(ExamplesError, match="do not fit into one tensor"):
        found.block(0, 4)
