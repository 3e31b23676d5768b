"""A real OPA decides: one that the sidecar starts for itself, or one that runs already.

Both are asked as the embedded engine works: a built-in that fails is undefined
(OPA's default; Wasm knows no other), and a conflict ends the evaluation. To ask
OPA for strict built-in errors would make the same bundle decide differently here.
"""
