"""Example models and data for jaxcode; not part of the installed library.

===============  =============================================================================================
`demo`           `python -m models.demo`: images are classified although a third of the workers never reply
`compare`        `python -m models.compare`: every code and a tuned one on a trained network, at several sizes
`comparison`     metrics of schemes on the same inputs and the same stragglers
`serve_bench`    `python -m models.serve_bench`: latencies of requests to real workers
`reproduce`      `python -m models.reproduce`: the paper's experiments, and the rates of errors that are proved
`experiments/`   what it measures
`results/`       what it measured: figures, plots, and what was published
`train_linear`   `python -m models.train_linear`: communication of distributed SAGA and of other methods
`plots`          plots of schemes, of latencies, and of one request
`lenet5`         LeNet5 as `flax.nnx` and as `flax.linen` module
`convnet`        a convolutional network for MNIST
`resnet`         residual networks for CIFAR-10, such as ResNet-20 and ResNet-56
`repvgg`         RepVGG, from a small one to A2, for training and merged for inference
`vit`            vision transformers, from a small one to ViT-B/16
`text_encoder`   a small transformer for texts, in two parts: what it embeds, and what it makes of that
`layers`         the convolution that the networks share
`networks`       networks by name, with their weights and recipes
`train`          `python -m models.train`: trains a network and writes its weights with a card
`training`       the training loop and its recipe
`convert`        `python -m models.convert`: reads published checkpoints of PyTorch networks
`serialization`  weights in safetensors files
`weights/`       weights of the repository, each with a card
`datasets`       scikit-learn's digits, names in Unicode, and MNIST, CIFAR-10 and LIBSVM's sets from files on disk
===============  =============================================================================================
"""
