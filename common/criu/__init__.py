"""CRIU as both roles use it: its image files (`images`), its RPC service (`rpc`), where it is (`locate`).

This file imports nothing: the keeper imports `common` and must not pay for numpy or protobuf.
"""
