"""Records that hold token ids, and optionally labels and the weight of each token in the loss."""

from veomni.batch.fields import IGNORE_INDEX
from veomni.data.sources.records import Document, field_of, is_weight
from veomni.data.text.tokens import Tokens
from veomni.errors import DataError

TOKEN_KEYS = ("input_ids", "labels", "loss_weights")
"""Fields of a record."""


def given_tokens(document: Document, vocabulary: int) -> Tokens:
    """Return the ids of a record, supervised where ``labels`` are not ``IGNORE_INDEX``, with their weights.

    Ids outside the vocabulary, other labels, and weights that are negative or not finite are a DataError.
    """
    ids = _integers(document, "input_ids", field_of(document, "input_ids", "RecordSchema.data_type"))
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        problem = f"{document.where}: token {wrong} in field 'input_ids', and the tokenizer has {vocabulary}"
        raise DataError(problem, "use the tokenizer that made the ids", field="build_tokenizer.path")
    weights = _given_weights(document, len(ids))
    if document.record.get("labels") is None:
        return Tokens.of(ids, weights)
    labels = _integers(document, "labels", document.record["labels"])
    if len(labels) != len(ids):
        raise DataError(f"{document.where}: {len(labels)} labels for {len(ids)} input_ids", "give each token one")
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, IGNORE_INDEX):
            problem = f"{document.where}: label {at} is {label}, neither its token {token} nor {IGNORE_INDEX}"
            raise DataError(problem, "labels are not shifted: the model does that")
    given = weights or [1.0] * len(ids)
    weighed = [0.0 if label == IGNORE_INDEX else weight for label, weight in zip(labels, given, strict=True)]
    return Tokens.of(ids, weighed)


def _given_weights(document: Document, count: int) -> list[float] | None:
    value = document.record.get("loss_weights")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count:
        problem = f"{document.where}: field {'loss_weights'!r} is no list of {count} numbers"
        raise DataError(problem, "give each of the input_ids one")
    for at, weight in enumerate(value):
        if not is_weight(weight):
            problem = f"{document.where}: weight {at} in field {'loss_weights'!r} is {weight!r}"
            raise DataError(problem, "use 0 (the token is not supervised) or a positive number")
    return value


def _integers(document: Document, key: str, value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise DataError(f"{document.where}: field {key!r} is no list of integers", "write [1, 2, ...]")
    return value
