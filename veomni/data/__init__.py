"""Data: sources, tokenizing, packing, and a loader whose order no layout changes and any layout resumes."""

from veomni.data.data_type import DATA_TYPES as DATA_TYPES
from veomni.data.data_type import DataType as DataType
from veomni.data.loading.build_dataloader import build_dataloader as build_dataloader
from veomni.data.loading.encoder import Encoder as Encoder
from veomni.data.loading.packed_loader import PackedLoader as PackedLoader
from veomni.data.loading.stream_loader import StreamLoader as StreamLoader
from veomni.data.loading.worker_pool import WorkerError as WorkerError
from veomni.data.options import BatchShape as BatchShape
from veomni.data.options import Order as Order
from veomni.data.options import Packing as Packing
from veomni.data.options import Workers as Workers
from veomni.data.sources.cache import build_once as build_once
from veomni.data.sources.corpora import CORPORA as CORPORA
from veomni.data.sources.corpora import PYTHON_STDLIB as PYTHON_STDLIB
from veomni.data.sources.dataset import DocumentStream as DocumentStream
from veomni.data.sources.dataset import IndexedDataset as IndexedDataset
from veomni.data.sources.dataset import build_dataset as build_dataset
from veomni.data.sources.formats import FORMATS as FORMATS
from veomni.data.sources.mixture import DataSource as DataSource
from veomni.data.sources.mixture import build_mixture as build_mixture
from veomni.data.sources.schema import RecordSchema as RecordSchema
from veomni.data.text.byte_bpe import cached_byte_bpe as cached_byte_bpe
from veomni.data.text.byte_bpe import train_byte_bpe as train_byte_bpe
from veomni.data.text.chat_templates import CHAT_TEMPLATES as CHAT_TEMPLATES
from veomni.data.text.tokens import Tokens as Tokens
