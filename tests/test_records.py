import json

import pytest
import tensorflow as tf

from aitok_jax.data.sources import nyu
from aitok_jax.data.sources.records import Records

CONTENTS = [b"first", b"", b"third" * 1000, b"\x00" * 7, b"last"]
COUNTS = [3, 2]


@pytest.fixture
def folder(tmp_path):
    """Two files, written by TensorFlow."""
    rest = iter(CONTENTS)
    for i, count in enumerate(COUNTS):
        with tf.io.TFRecordWriter(str(tmp_path / f"things-train.tfrecord-0000{i}-of-00002")) as writer:
            for _ in range(count):
                writer.write(next(rest))
    write_info(tmp_path)
    return tmp_path


def write_info(folder, **changes):
    splits = [{"name": "train", "shardLengths": [str(count) for count in COUNTS]}]
    (folder / "dataset_info.json").write_text(json.dumps({"name": "things", "splits": splits} | changes))


def change(folder, shard, edit):
    path = folder / f"things-train.tfrecord-0000{shard}-of-00002"
    content = bytearray(path.read_bytes())
    path.write_bytes(edit(content))
    return path


def flipped(place):
    def edit(content):
        content[place] ^= 1
        return content

    return edit


def test_reads_in_any_order(folder):
    records = Records(folder, "train")
    assert len(records) == 5
    assert [records.read(i) for i in (4, 2, 0, 1, 3)] == [CONTENTS[i] for i in (4, 2, 0, 1, 3)]


@pytest.mark.parametrize("place", [12, 16, 17, 20])  # the content of the first record, and its sum
def test_a_corrupt_record_is_named_and_leaves_the_others_readable(folder, place):
    change(folder, 0, flipped(place))
    records = Records(folder, "train")
    with pytest.raises(nyu.DataError, match=r"tfrecord-00000-of-00002, record 0 \(byte 0\) is corrupt: .*copy it anew"):
        records.read(0)
    assert records.read(1) == CONTENTS[1]


@pytest.mark.parametrize("place", [0, 7, 8, 11])  # the length, and its sum
def test_a_corrupt_length_loses_the_rest_of_the_file(folder, place):
    change(folder, 0, flipped(16 + 5 + place))
    message = r"00000-of-00002, record 1 \(byte 21\): its length is corrupt, so that 2 of the file's 3 records"
    with pytest.raises(nyu.DataError, match=message):
        Records(folder, "train")
    records = Records(folder, "train", on_error="skip")
    assert [records.read(i) for i in (0, 3, 4)] == [CONTENTS[i] for i in (0, 3, 4)]
    for lost in (1, 2):
        with pytest.raises(nyu.DataError, match=message):
            records.read(lost)


@pytest.mark.parametrize("left", [0, 10, 20, 21, 30, 5040])
def test_a_file_that_ends_early(folder, left):
    change(folder, 0, lambda content: content[:left])
    with pytest.raises(nyu.DataError, match=r"00000-of-00002, record \d \(byte \d+\): .*prepare the data again"):
        Records(folder, "train")
    records = Records(folder, "train", on_error="skip")
    assert records.read(3) == CONTENTS[3]
    with pytest.raises(nyu.DataError):
        records.read(2)


def test_a_file_changed_while_in_use(folder):
    records = Records(folder, "train")
    path = change(folder, 1, lambda content: content[:10])
    with pytest.raises(nyu.DataError, match=r"record 0 .* is corrupt"):
        records.read(3)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002"):
        records.read(3)


def test_wrong_folders(folder):
    with pytest.raises(ValueError, match="no split 'test' among train; prepare it"):
        Records(folder, "test")
    write_info(folder, fileFormat="array_record")
    with pytest.raises(ValueError, match="'array_record' cannot be read"):
        Records(folder, "train")
    write_info(folder)
    (folder / "things-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002: missing file of prepared data"):
        Records(folder, "train", on_error="skip")
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(nyu.DataError, match=r"dataset_info\.json: malformed JSON"):
        Records(folder, "train")
