// The kernels behind torchao's two sparse ops on sm_90, made of CUTLASS with torchao's template arguments, and what a
// launch of each is given. torchao 0.18: csrc/cuda/to_sparse_semi_structured_cutlass_sm9x/*.cuh and
// csrc/cuda/rowwise_scaled_linear_sparse_cutlass/*.cuh.

#include <cstring>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/device_kernel.h>
#include <cutlass/transform/kernel/sparse_gemm_compressor.hpp>
#include <cutlass/util/packed_stride.hpp>

// What a launch is given.
struct Launch {
  int accepted, grid[3], cluster[3], shared, bytes;
  int sizes[3];  // of the compressor's outputs: columns of values, rows and columns of metadata
  unsigned char parameters[4096];
};

namespace torchao {

// As torchao calls them, so that a kernel's name here is its name there, template arguments and all.
template <class Kernel>
struct enable_3x_kernel_for_sm90_or_later : Kernel {};

}  // namespace torchao

namespace {

using torchao::enable_3x_kernel_for_sm90_or_later;
using cutlass::arch::Sm90;
using E4M3 = cutlass::float_e4m3_t;
using Problem = cute::Shape<int, int, int, int>;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

// What ptx/bulk.py reads a tensor map as: MAP.
struct Map {
  uint64_t base, strides[4];
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t size, rank, swizzle;
};

template <class Kernel>
void fill(Launch* launch, typename Kernel::Params const& parameters, bool accepted) {
  static_assert(sizeof(parameters) <= sizeof(launch->parameters));
  dim3 const grid = Kernel::get_grid_shape(parameters);
  launch->accepted = accepted;
  launch->grid[0] = grid.x, launch->grid[1] = grid.y, launch->grid[2] = grid.z;
  launch->shared = Kernel::SharedStorageSize;
  launch->bytes = sizeof(parameters);
  std::memcpy(launch->parameters, &parameters, sizeof(parameters));
}

// values [n, k] to half of them and metadata

using CompressorConfig = cutlass::Sm90GemmSparseConfig<
    cute::sparse_elem<2, E4M3>, cute::GMMA::Major::K, cute::sparse_elem<8, unsigned char>, cute::_128>;
using Compressor = enable_3x_kernel_for_sm90_or_later<
    cutlass::transform::kernel::StructuredSparseCompressor<Problem, E4M3, RowMajor, CompressorConfig, Sm90>>;
using CompressorSizes =
    cutlass::transform::kernel::StructuredSparseCompressorUtility<Problem, E4M3, RowMajor, CompressorConfig>;

// y [m, n] = (w x^T) w_scale x_scale + bias, for CUTLASS column-major [n, m]

template <int TileN, int TileM, int ClusterM, bool Biased, class Out>
struct Product {
  using Tile = cute::Shape<cute::Int<TileN>, cute::Int<TileM>, cute::_256>;
  using Cluster = cute::Shape<cute::_1, cute::Int<ClusterM>, cute::_1>;
  static constexpr auto Round = cutlass::FloatRoundStyle::round_to_nearest;
  template <template <class> class Function, class Left, class Right>
  using Joined = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Function, float, float, Round>, Left, Right>;
  using WScale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float>;
  using XScale = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>;
  using Bias = std::conditional_t<
      Biased, cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, Out>,
      cutlass::epilogue::fusion::Sm90ScalarBroadcast<Out>>;
  using Scaled =
      Joined<cutlass::multiplies, Joined<cutlass::multiplies, cutlass::epilogue::fusion::Sm90AccFetch, WScale>, XScale>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, Out, ColumnMajor, 8, Out, ColumnMajor, 8, cutlass::epilogue::TmaWarpSpecialized,
      Joined<cutlass::plus, Scaled, Bias>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Sm90, cutlass::arch::OpClassSparseTensorOp, E4M3, RowMajor, 16, E4M3, ColumnMajor, 16, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum>::CollectiveOp;
  using Kernel =
      enable_3x_kernel_for_sm90_or_later<cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>>;

  static void describe(int m, int n, int k, void** at, Launch* launch) {
    Problem const problem(n, m, k, 1);
    using Config = typename Mainloop::SparseConfig;
    auto const of_x = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(m, k, 1));
    auto const of_y = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(n, m, 1));
    auto* y = static_cast<Out*>(at[6]);
    typename Kernel::Arguments given{
        cutlass::gemm::GemmUniversalMode::kGemm,
        problem,
        {static_cast<E4M3*>(at[0]), Config::fill_layoutA(problem), static_cast<E4M3*>(at[1]), of_x,
         static_cast<typename Mainloop::ElementE*>(at[2]), Config::fill_layoutE(problem)},
        {{}, y, of_y, y, of_y}};
    typename WScale::Arguments w_scale{static_cast<float*>(at[3]), 1.0f, {cute::_1{}, cute::_0{}, cute::_0{}}};
    typename XScale::Arguments x_scale{static_cast<float*>(at[4]), 1.0f, {cute::_0{}, cute::_1{}, cute::_0{}}};
    typename Bias::Arguments bias{};
    if constexpr (Biased) {
      bias = {static_cast<Out*>(at[5]), Out(0), {cute::_1{}, cute::_0{}, cute::_0{}}};
    } else {
      bias = {{Out(0)}};
    }
    given.epilogue.thread = {{{{}, w_scale, {}}, x_scale, {}}, bias, {}};
    given.hw_info.device_id = 0;
    given.hw_info.sm_count = 4;  // programs: few, so that each has several tiles
    launch->cluster[0] = launch->cluster[2] = 1, launch->cluster[1] = ClusterM;
    fill<Kernel>(launch, Kernel::to_underlying_arguments(given, nullptr), Kernel::can_implement(given));
  }
};

using UpTo64 = Product<64, 32, 1, true, cutlass::bfloat16_t>;
using UpTo128 = Product<64, 128, 1, false, cutlass::half_t>;
using More = Product<128, 128, 2, true, cutlass::bfloat16_t>;

}  // namespace

template __global__ void cutlass::device_kernel<Compressor>(CUTLASS_GRID_CONSTANT Compressor::Params const);
template __global__ void cutlass::device_kernel<UpTo64::Kernel>(CUTLASS_GRID_CONSTANT UpTo64::Kernel::Params const);
template __global__ void cutlass::device_kernel<UpTo128::Kernel>(CUTLASS_GRID_CONSTANT UpTo128::Kernel::Params const);
template __global__ void cutlass::device_kernel<More::Kernel>(CUTLASS_GRID_CONSTANT More::Kernel::Params const);

extern "C" {

// In place of the driver's.
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* made, CUtensorMapDataType type, cuuint32_t rank, void* base, cuuint64_t const* sizes,
    cuuint64_t const* strides, cuuint32_t const* box, cuuint32_t const*, CUtensorMapInterleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Map map{};
  map.base = reinterpret_cast<uint64_t>(base);
  uint8_t const bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};  // of u8 u16 u32 i32 u64 i64 f16 f32 f64 bf16
  map.size = bytes[type];
  map.rank = rank;
  map.swizzle = swizzle;
  for (cuuint32_t axis = 0; axis < rank; ++axis) {
    map.sizes[axis] = sizes[axis];
    map.box[axis] = box[axis];
    if (axis) map.strides[axis - 1] = strides[axis - 1];
  }
  std::memset(made, 0, sizeof(*made));
  std::memcpy(made, &map, sizeof(map));
  return CUDA_SUCCESS;
}

// at: values [n, k], room for values, room for metadata
void compressor(int n, int k, void** at, Launch* launch) {
  Problem const problem(n, 1, k, 1);
  auto const stride =
      cutlass::make_cute_packed_stride(cutlass::gemm::TagToStrideA_t<RowMajor>{}, cute::make_shape(n, k, 1));
  CompressorSizes sizes(problem, stride);
  launch->sizes[0] = sizes.get_tensorA_k_physical();
  launch->sizes[1] = sizes.get_metadata_m_physical();
  launch->sizes[2] = sizes.get_metadata_k_physical();
  Compressor::Arguments given{problem, {at[0], stride, at[1], at[2]}, {}};
  launch->cluster[0] = launch->cluster[1] = launch->cluster[2] = 1;
  fill<Compressor>(
      launch, Compressor::to_underlying_arguments(given), Compressor::can_implement(given) == cutlass::Status::kSuccess);
}

// at: values, x, metadata, scale, x_scale, bias, y
void up_to_64(int m, int n, int k, void** at, Launch* launch) { UpTo64::describe(m, n, k, at, launch); }
void up_to_128(int m, int n, int k, void** at, Launch* launch) { UpTo128::describe(m, n, k, at, launch); }
void more(int m, int n, int k, void** at, Launch* launch) { More::describe(m, n, k, at, launch); }
}
