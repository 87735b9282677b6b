"""Data: sources, tokenising, packing, and a loader whose order no layout changes and any layout resumes."""

from veomni.data.loading.build_dataloader import build_dataloader
from veomni.data.loading.loader import PackedDataLoader
from veomni.data.loading.stream_loader import StreamLoader
from veomni.data.loading.workers import WorkerError
from veomni.data.sources.build_dataset import build_dataset
from veomni.data.sources.build_once import build_once
from veomni.data.sources.corpora import CORPORA, PYTHON_STDLIB
from veomni.data.sources.dataset import TextDataset
from veomni.data.sources.formats import FORMATS
from veomni.data.sources.mixture import DataSource, Mixture
from veomni.data.text.byte_bpe import cached_byte_bpe, train_byte_bpe
from veomni.data.text.chat_templates import CHAT_TEMPLATES
from veomni.data.text.transforms import TRANSFORMS

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
