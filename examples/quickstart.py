"""Run the shipped model with a quarter of its experts' memory: the README's example."""

from foreload import Engine

with Engine.from_pretrained("demo", expert_memory="25%") as engine:
    result = engine.generate("def read_config(path):\n", max_new_tokens=48)
print(result.text)
print(f"{result.stats.hit_rate:.0%} of the expert lookups found the expert in memory")
