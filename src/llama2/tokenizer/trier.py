"""A tokenizer that tries texts where its patterns can harm nobody: a process of its own (`trial.py` starts it).

It imports nothing of this package. Each line in is JSON: {"seconds", "special"}, a tokenizer.json, and then any number
of {"seconds", "texts"}. Each line out is "" where the file was read, or all texts were encoded, or what the Rust side
said against it. Beyond the seconds of processor time, or the memory, the process ends without a line.
"""

import json
import resource
import signal
import sys

MEMORY = 1 << 30  # bytes of addresses beyond what the tokenizer has


def main() -> None:
    """Answers until there is no line left."""
    import tokenizers

    asked = json.loads(sys.stdin.readline())
    signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
    backend = tokenizers.Tokenizer.from_str(sys.stdin.readline())
    signal.setitimer(signal.ITIMER_PROF, 0)
    backend.encode_special_tokens = asked["special"]
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
