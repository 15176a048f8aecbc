"""Example models and data for jaxcode; not part of the installed library.

===============  =====================================================================================
`demo`           `python -m models.demo`: a LeNet5 answers although a third of its workers never reply
`compare`        `python -m models.compare`: every code and a tuned one on a trained network, at several sizes
`comparison`     metrics of schemes on the same inputs and the same stragglers
`serve_bench`    `python -m models.serve_bench`: latencies of requests to real workers
`experiments`    `python -m models.experiments.rates`: how fast errors fall, beside what is proved
`train_linear`   `python -m models.train_linear`: communication of distributed SAGA and of other methods
`plots`          plots of schemes, of latencies, and of one request
`lenet5`         LeNet5 as `flax.nnx` and as `flax.linen` module
`resnet`         a small residual network as `flax.nnx` module
`networks`       trained networks, stored in files
`train`          a short training loop for `flax.nnx` classifiers
`weights`        trained weights in safetensors files
`datasets`       scikit-learn's digits, MNIST, CIFAR-10 and LIBSVM's sets from files on disk
===============  =====================================================================================
"""
