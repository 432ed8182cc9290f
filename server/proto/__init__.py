"""The wire format. `*_pb2*` are generated from `*.proto` by `make proto`."""
