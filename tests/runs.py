"""Settings of the smallest run: two clients, whose heads train for two rounds."""

SMALL = {
    "clients": 2,
    "rounds": 2,
    "train-examples": 60,
    "test-examples": 30,
    "image-size": 32,
    "method": "head",
    "local-epochs": 1,
}
