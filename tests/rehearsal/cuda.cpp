// A CUDA device made of CPU memory, for a build of torch without CUDA: every operator on it runs on the CPU, on the same
// memory. What it is for: code that mixes devices, or asks a GPU what no GPU answers, fails as it would on one.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <unordered_map>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

// The memory of `owner`, kept alive, as memory of `device`
c10::DataPtr shared(const c10::Storage& owner, c10::Device device) {
  auto* kept = new c10::Storage(owner);
  return {kept->mutable_data(), kept, [](void* held) { delete static_cast<c10::Storage*>(held); }, device};
}

c10::Storage over(const c10::Storage& owner, c10::Device device) {
  return c10::Storage(c10::Storage::use_byte_size_t(), owner.nbytes(), shared(owner, device), c10::GetCPUAllocator(), true);
}

at::Tensor laid(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

// The device's generator is a CPU one under another name
struct Random final : c10::GeneratorImpl {
  explicit Random(at::Generator host)
      : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::CUDA)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override { return new Random(host.clone()); }
  at::Generator host;
};

// One call: which CPU storage stands for which storage of the device, and what became of it
struct Call {
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_of;    // device's -> CPU's
  std::unordered_map<c10::StorageImpl*, c10::Storage> device_of;  // and back
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;           // (device's, CPU's), of the arguments

  const c10::Storage& host(const c10::Storage& storage) {
    auto* key = storage.unsafeGetStorageImpl();
    if (!host_of.count(key)) {
      host_of.emplace(key, over(storage, c10::kCPU));
      device_of.emplace(host_of.at(key).unsafeGetStorageImpl(), storage);
    }
    return host_of.at(key);
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (auto& [theirs, ours] : pairs)
      if (theirs.is_same(tensor)) return ours;
    auto made = laid(host(tensor.storage()), tensor, c10::DispatchKey::CPU);
    pairs.emplace_back(tensor, made);
    return made;
  }

  at::Tensor device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& [theirs, ours] : pairs)
      if (ours.is_same(tensor)) return theirs;
    auto* key = tensor.storage().unsafeGetStorageImpl();
    if (!device_of.count(key)) device_of.emplace(key, over(tensor.storage(), kDevice));
    return laid(device_of.at(key), tensor, c10::DispatchKey::CUDA);
  }

  // out= tensors may have been resized, set_ may have given another storage
  void settle() {
    for (auto& [theirs, ours] : host_of)
      if (theirs->data() != ours.data()) {
        theirs->set_data_ptr_noswap(shared(ours, kDevice));
        theirs->set_nbytes(ours.nbytes());
      }
    for (auto& [theirs, ours] : pairs) {
      auto* impl = theirs.unsafeGetTensorImpl();
      auto* key = ours.storage().unsafeGetStorageImpl();
      if (!device_of.count(key)) device_of.emplace(key, over(ours.storage(), kDevice));
      impl->set_storage_keep_dtype(device_of.at(key));
      if (impl->sizes() != ours.sizes() || impl->strides() != ours.strides() ||
          impl->storage_offset() != ours.storage_offset())
        impl->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    }
  }
};

// Where CUDA's own kernels take tensors of both devices
bool takes_both(const std::string& name) { return name == "aten::copy_" || name == "aten::_copy_from"; }

void on_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call;
  bool here = false, elsewhere = false;
  auto taken = [&](const at::Tensor& tensor) {
    if (tensor.defined()) {
      here |= tensor.is_cuda();
      elsewhere |= tensor.is_cpu() && tensor.dim() > 0;  // a number may come from the CPU
    }
    return call.host(tensor);
  };
  for (size_t i = stack->size() - schema.arguments().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = taken(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = taken(tensor);
      value = list;
    } else if (value.isOptionalTensorList()) {
      // indices, which may lie on the CPU
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& one : value.toOptionalTensorList()) {
        here |= one && one->defined() && one->is_cuda();
        list.push_back(one ? std::optional<at::Tensor>(call.host(*one)) : std::nullopt);
      }
      value = list;
    } else if (value.isStorage() && value.toStorage().device().is_cuda()) {
      value = call.host(value.toStorage());
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      auto* random = dynamic_cast<Random*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(random, "Expected a 'cuda' device type for generator but found 'cpu'");
      value = random->host;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::kCPU);
    }
  }
  TORCH_CHECK(!(here && elsewhere) || takes_both(schema.name()),
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", schema.name(), ")");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.device(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = call.device(tensor);
      value = list;
    }
  }
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator one = at::make_generator<Random>(at::detail::createCPUGenerator());
    return one;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Random>(at::detail::createCPUGenerator());
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

}  // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // these have one kernel for all devices, which asks for the device's own code inside
  for (const char* name : {"copy_", "set_.source_Storage_storage_offset", "_reshape_alias", "resize_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}
