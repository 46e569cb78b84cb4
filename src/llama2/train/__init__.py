"""Fine-tuning: rows, objectives, the loop, and layers that train fast on a CPU."""
