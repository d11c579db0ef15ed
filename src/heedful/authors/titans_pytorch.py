"""The unofficial lucidrains/titans-pytorch, neural_memory.NeuralMemory with its default memory (MLP)."""

from heedful.authors.table import Table

TABLES = {
    "TitansPytorchMemory": Table(
        rename=(
            (r"memory_model_parameters\.0", "gamma"),
            *((rf"memory_model_parameters\.{layer + 1}", f"memory.{layer}") for layer in range(8)),
            (r"to_queries\.weight", "query.weight"),
            (r"to_keys\.weight", "key.weight"),
            (r"to_values\.weight", "value.weight"),
            (r"to_adaptive_step\.0\.(.*)", r"step.\1"),
            (r"to_momentum\.0\.(.*)", r"momentum.\1"),
            (r"to_decay_factor\.0\.(.*)", r"forget.\1"),
            (r"combine_heads\.weight", "out.weight"),
            (r"retrieve_gate\.0\.weight", "gate.weight"),
        ),
        drop=(r"memory_model\..*",),  # shapes of the memory, never read
    )
}
