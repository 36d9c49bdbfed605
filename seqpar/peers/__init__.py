"""Messages between GPUs of one host past NCCL, over memory that they read and write in each other.

`sharing` says which groups do so; `memory` is the all_gather by one launch, `exchange` large
messages by copy engines, and their `_limit` what happens when a rank never comes.
"""
