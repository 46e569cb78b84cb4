"""A tokenizer that tries texts where its patterns can harm nobody: a process of its own (`trial.py` starts it).

It imports nothing of this package. Each line in is JSON; the first is a tokenizer.json, each that follows
{"seconds", "texts"}. Each line out is "" where all texts were encoded, or what the Rust side panicked with. Beyond the
seconds of processor time, or the memory, the process ends without a line.
"""

import json
import resource
import signal
import sys

MEMORY = 1 << 30  # bytes of addresses beyond what the tokenizer has


def main() -> None:
    """Answers until there is no line left."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(sys.stdin.readline())
    backend.encode_special_tokens = json.loads(sys.stdin.readline())
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(flush=True)
    for line in sys.stdin:
        asked, said = json.loads(line), ""
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        try:
            for text in asked["texts"]:
                backend.encode(text, add_special_tokens=False)
        except Exception:  # what the caller will meet too, and knows
            said = ""
        except BaseException as error:
            said = " ".join(str(error).split())[:300] or "a panic"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(said, flush=True)


if __name__ == "__main__":
    main()
