"""The evaluation harness: tasks of benchmarks, policies that play them, results that can be continued.

`harness` plays and stores, `table` reports; `policies`, `engine_policy` and `endpoint` are who plays; `bfcl`,
`apibank`, `acebench` and `embedded` are what is played. Benchmark code runs in processes of its own (`sandbox`).
"""
