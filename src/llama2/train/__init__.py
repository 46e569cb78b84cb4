"""Fine-tuning: rows, objectives, the loop, and layers that train fast on a CPU."""

import os

# torch and oneDNN each keep what they made for 1,024 shapes of products, half a megabyte a shape and more for wide ones;
# rows of many lengths filled gigabytes. Both read their bound at the first product: one that ran before keeps its own.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")
