"""Reads the intact messages of damaged MCAP files, and makes complete bags of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mcap.reader import make_reader
from mcap.records import Channel, Chunk, McapRecord, Message, Schema
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import CompressionType, Writer
from ruamel.yaml import YAML

from xview_loc.bags.chunks import unpack_message  # also bounds what all readers unpack
from xview_loc.bags.metadata import FileSummary, write_metadata
from xview_loc.errors import UserError, reason, shown
from xview_loc.files import open_regular, read_regular, whole_folder

# A longer record has a damaged length.
_LONGEST_RECORD = 1 << 30
_MAX_METADATA_BYTES = 16 << 20


class BagError(UserError):
    """A bag cannot be used; the message is one clear line."""


@dataclass
class Damage:
    """What could not be read of a file.

    chunks_skipped: damaged chunks, and messages that rosbag2 compressed one by one and that are damaged.
    undescribed: messages whose topic was described only in a damaged chunk.
    ended_early: where reading had to end, and why; "" at the file's end.
    """

    chunks_skipped: int = 0
    undescribed: int = 0
    ended_early: str = ""

    def __bool__(self) -> bool:
        return bool(self.chunks_skipped or self.ended_early)


@dataclass(frozen=True)
class RawMessage:
    """One message of a bag: topic, type, definition, stamp in nanoseconds, CDR bytes."""

    topic: str
    kind: str
    definition: bytes
    stamp_ns: int
    data: bytes


def read_intact(path: Path, damage: Damage) -> Iterator[RawMessage]:
    """Yield all messages of an MCAP file whose chunks' checksums hold, in the file's order.

    Fills in ``damage``. Raises BagError if the file is not MCAP, OSError.
    """
    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    with open_regular(path) as file:
        # A complete file repeats these at its end, out of the damaged chunks.
        try:
            summary = make_reader(file).get_summary()
        except Exception:
            summary = None
        if summary is not None:
            schemas.update(summary.schemas)
            channels.update(summary.channels)
        file.seek(0)
        records = StreamReader(file, emit_chunks=True, record_size_limit=_LONGEST_RECORD).records
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:
                if file.tell() <= 8 and not damage:
                    raise BagError(f"{path} is not an MCAP file") from None
                damage.ended_early = f"{type(error).__name__} at byte {file.tell()}"
                return
            inner: list[McapRecord] = [record]
            if isinstance(record, Chunk):
                try:
                    inner = breakup_chunk(record, validate_crc=True)
                except Exception:
                    damage.chunks_skipped += 1
                    continue
            for item in inner:
                if isinstance(item, Schema):
                    schemas[item.id] = item
                elif isinstance(item, Channel):
                    channels[item.id] = item
                elif isinstance(item, Message):
                    channel = channels.get(item.channel_id)
                    schema = schemas.get(channel.schema_id) if channel else None
                    if channel is None or schema is None:
                        damage.undescribed += 1
                        continue
                    try:
                        data = unpack_message(item.data)
                    except ValueError:
                        damage.chunks_skipped += 1
                        continue
                    yield RawMessage(channel.topic, schema.name, schema.data, item.log_time, data)


@dataclass
class Recovery:
    """Result of :func:`recover_bag`: messages saved, and the damage by file."""

    messages: int = 0
    damage: dict[str, Damage] = field(default_factory=dict)


def bag_files(folder: Path) -> list[Path]:
    """Return a bag's MCAP files in the order they were written. Raises BagError without one."""

    def number(path: Path) -> tuple[int, str]:
        match = re.search(r"_(\d+)\.mcap$", path.name)
        return (int(match[1]) if match else 0, path.name)

    files = sorted(folder.glob("*.mcap"), key=number) if folder.is_dir() else []
    if not files:
        raise BagError(f"{folder} holds no .mcap files")
    return files


def check_files(bag: Path) -> None:
    """Raise BagError if a bag has pipes or devices for files, or names files outside its folder."""
    folder = bag if bag.is_dir() else bag.parent
    metadata = folder / "metadata.yaml"
    files = [metadata, *folder.glob("*.mcap*"), *folder.glob("*.db3*")] if bag.is_dir() else [bag]
    for file in files:
        if file.exists() and not file.is_file():
            raise BagError(f"cannot read {file}: it is not a regular file")
    if not bag.is_dir() or not metadata.exists():
        return
    try:
        content = YAML(typ="safe").load(read_regular(metadata, _MAX_METADATA_BYTES).decode())
        names = content["rosbag2_bagfile_information"]["relative_file_paths"]
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    except Exception as error:  # damaged YAML raises anything
        raise BagError(f"cannot read {metadata}: {reason(error)}") from None
    if outside:
        raise BagError(f"{metadata} names a file outside its folder: {shown(outside[0], 200)}")


def recover_bag(folder: Path, out: Path) -> Recovery:
    """Copy the intact messages of the bag ``folder`` into a new, complete bag ``out``.

    The original is not changed. Raises BagError if there is nothing to recover or ``out`` exists, OSError.
    """
    files = bag_files(folder)
    if out.exists():
        raise BagError(f"{out} exists already: choose another folder")
    if folder.resolve() in out.resolve().parents:
        raise BagError(f"{out} lies in the bag itself: choose another folder")
    recovery, summaries = Recovery(), []
    topics: dict[str, str] = {}
    with whole_folder(out) as partial:
        partial.mkdir(parents=True)
        for source in files:
            damage, summary = Damage(), FileSummary(source.name)
            try:
                _copy_intact(source, partial / source.name, damage, summary, topics)
            except BagError:
                damage.ended_early = "not an MCAP file"
                (partial / source.name).unlink(missing_ok=True)
            if damage:
                recovery.damage[source.name] = damage
            if summary.counts:
                summaries.append(summary)
                recovery.messages += summary.counts.total()
        write_metadata(partial, summaries, topics)
    return recovery


def _copy_intact(
    source: Path, target: Path, damage: Damage, summary: FileSummary, topics: dict[str, str]
) -> None:
    channels: dict[str, int] = {}
    with target.open("xb") as file:
        writer = Writer(file, compression=CompressionType.ZSTD)
        writer.start(profile="ros2", library="xview_loc")
        for message in read_intact(source, damage):
            if message.topic not in channels:
                schema = writer.register_schema(message.kind, "ros2msg", message.definition)
                channels[message.topic] = writer.register_channel(message.topic, "cdr", schema)
                topics[message.topic] = message.kind
            writer.add_message(channels[message.topic], message.stamp_ns, message.data, message.stamp_ns)
            summary.add(message.topic, message.stamp_ns)
        writer.finish()
        file.flush()
        os.fsync(file.fileno())
    if not summary.counts:
        target.unlink()
