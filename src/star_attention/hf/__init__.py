"""All contact with transformers' models: loading, attention, caches, text."""

import logging

_NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
}
"""Beginnings of messages, by logger.

transformers imports torchao wherever it is installed, whether it is used or not, and torchao then
logs which kernels it lacks on this machine.
"""


def _drop(beginning: str) -> logging.Filter:
    class Drop(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not str(record.msg).startswith(beginning)

    return Drop()


for _name, _beginning in _NOISE.items():
    logging.getLogger(_name).addFilter(_drop(_beginning))
