"""The controller's ports on Kubernetes: objects, pods, nodes, and the lease of the leader.

`api` is the only file that imports the client library. `watch` keeps caches; `store`, `pods` and `nodes` project what
is in them into the contract's types; `lease` decides who acts.
"""
