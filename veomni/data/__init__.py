"""Data: sources, tokenising, packing, and a loader whose order no layout changes and any layout resumes."""

from veomni.data.build_dataloader import build_dataloader
from veomni.data.build_dataset import build_dataset
from veomni.data.build_once import build_once
from veomni.data.byte_bpe import cached_byte_bpe, train_byte_bpe
from veomni.data.chat_templates import CHAT_TEMPLATES
from veomni.data.corpora import CORPORA, PYTHON_STDLIB
from veomni.data.dataset import TextDataset
from veomni.data.formats import FORMATS
from veomni.data.loader import PackedDataLoader
from veomni.data.mixture import DataSource, Mixture
from veomni.data.stream_loader import StreamLoader
from veomni.data.transforms import TRANSFORMS
from veomni.data.workers import WorkerError

__all__ = [
    "CHAT_TEMPLATES",
    "CORPORA",
    "FORMATS",
    "PYTHON_STDLIB",
    "TRANSFORMS",
    "DataSource",
    "Mixture",
    "PackedDataLoader",
    "StreamLoader",
    "TextDataset",
    "WorkerError",
    "build_dataloader",
    "build_dataset",
    "build_once",
    "cached_byte_bpe",
    "train_byte_bpe",
]
