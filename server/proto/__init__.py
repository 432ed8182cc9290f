"""The wire format. `ranking_pb2*` are generated from `ranking.proto` by `make proto`."""
