"""How good generated answers are: metrics, and how sure one can be of them."""
