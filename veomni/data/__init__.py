"""Data: sources, tokenizing, packing, and a loader whose order no layout changes and any layout resumes."""

from veomni.data.data_type import DATA_TYPES, DataType, Encoded
from veomni.data.loading.build_dataloader import build_dataloader
from veomni.data.loading.encoder import Encoder
from veomni.data.loading.packed_loader import PackedLoader
from veomni.data.loading.stream_loader import StreamLoader
from veomni.data.loading.worker_pool import WorkerError
from veomni.data.options import BatchShape, Order, Packing, Workers
from veomni.data.protocols import Loader
from veomni.data.sources.cache import build_once
from veomni.data.sources.corpora import CORPORA, PYTHON_STDLIB
from veomni.data.sources.dataset import IndexedDataset, build_dataset
from veomni.data.sources.formats import FORMATS
from veomni.data.sources.mixture import DataSource, build_mixture
from veomni.data.sources.opened import DocumentStream
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.byte_bpe import cached_byte_bpe, train_byte_bpe
from veomni.data.text.chat_templates import CHAT_TEMPLATES

__all__ = [
    "CHAT_TEMPLATES",
    "CORPORA",
    "DATA_TYPES",
    "FORMATS",
    "PYTHON_STDLIB",
    "BatchShape",
    "DataSource",
    "DataType",
    "DocumentStream",
    "Encoded",
    "Encoder",
    "IndexedDataset",
    "Loader",
    "Order",
    "PackedLoader",
    "Packing",
    "RecordSchema",
    "StreamLoader",
    "WorkerError",
    "Workers",
    "build_dataloader",
    "build_dataset",
    "build_mixture",
    "build_once",
    "cached_byte_bpe",
    "train_byte_bpe",
]
