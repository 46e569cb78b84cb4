"""Logs as JSON lines on the standard error, written by a thread of their own: a full pipe stops no answer.

A line has no text of a prompt or an answer, and no key.
"""

import json
import logging
import logging.handlers
import queue
import sys
import time
from typing import TextIO

logger = logging.getLogger("llama2.serve")


class JsonLines(logging.Formatter):
    """One object per line: time, level, event, and what the record carries in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line["event"] = record.getMessage()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        # ASCII alone, without DEL: a terminal obeys U+009B and its like, and some readers end lines at U+2028.
        return json.dumps(line, default=str).replace("\x7f", "\\u007f")


class Dropping(logging.handlers.QueueHandler):
    """Hands records to the writing thread; what does not fit is counted and dropped."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never waits."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """As it is: the record stays in this process."""
        return record


def start(level: str = "info", to: TextIO | None = None) -> logging.handlers.QueueListener:
    """Sends this package's and uvicorn's logs through the writing thread; stop() writes what is left."""
    stream = logging.StreamHandler(to or sys.stderr)
    stream.setFormatter(JsonLines())
    box: queue.Queue[logging.LogRecord] = queue.Queue(10_000)
    for name in ("llama2.serve", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [Dropping(box)], False
        log.setLevel(level.upper())
    listener = logging.handlers.QueueListener(box, stream)
    listener.start()
    return listener
