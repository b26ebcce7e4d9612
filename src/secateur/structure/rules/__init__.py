"""One small function per operator: what it does to the axes of its tensors. Importing fills the table."""

from secateur.structure.rules import (
    attention,
    elementwise,
    indexing,
    joins,
    norms,
    products,
    recurrent,
    routing,
    shapes,
    spatial,
)
from secateur.structure.table import function, operator

__all__ = [
    "attention",
    "elementwise",
    "function",
    "indexing",
    "joins",
    "norms",
    "operator",
    "products",
    "recurrent",
    "routing",
    "shapes",
    "spatial",
]
