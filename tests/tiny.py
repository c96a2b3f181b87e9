"""Command-line words for a PGD run on digits that takes about a second."""

TINY = [
    "--data.train_size=120",
    "--data.validation_size=60",
    "--training.epochs=3",
    "--training.batch_size=40",
    "--model.widths=[4,4]",
    "--model.strides=[2,2]",
    "--method.num_steps=2",
    "--evaluation.num_steps=2",
    "--evaluation.test_num_steps=2",
    "--evaluation.test_size=50",
    "--probe.size=20",
    "--probe.num_steps=2",
]
